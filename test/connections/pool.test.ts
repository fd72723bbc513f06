import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, inject, test } from 'vitest';
import { createClient, createPool } from '../../src/connections/pool.ts';
import { startPrivatePostgres } from '../demo/servers.ts';
import { CERTIFICATE, PRIVATE_KEY } from '../support/certificate.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { asRelay, grantLeast } from '../support/least-privilege.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const URL_WITHOUT_TLS = asRelay(inject('adminUrl'));

/** Connects, and answers whether the connection is encrypted. */
async function isEncrypted(url: string): Promise<boolean> {
  const pool = createPool(url, { max: 2 });
  try {
    const { rows } = await pool.query('SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()');
    return rows[0].ssl;
  } finally {
    await pool.end();
  }
}

describe('a server without TLS', () => {
  test.each(['', '?sslmode=prefer', '?sslmode=allow', '?sslmode=disable', '?ssl=prefer'])(
    'is reached in plain text with %j',
    async (query) => {
      expect(await isEncrypted(URL_WITHOUT_TLS + query)).toBe(false);
    },
  );

  test.each(['?sslmode=require', '?ssl=require', '?sslmode=verify-full', '?ssl=true'])(
    'is refused with %j',
    async (query) => {
      await expect(isEncrypted(URL_WITHOUT_TLS + query)).rejects.toThrow('does not support SSL');
    },
  );

  test('is reached by a single client as well', async () => {
    const client = createClient(URL_WITHOUT_TLS, { application_name: 'pool test' });
    await client.connect();
    const { rows } = await client.query('SHOW application_name');
    await client.end();
    expect(rows).toEqual([{ application_name: 'pool test' }]);
  });

  test('is used in full: parameters, several statements, notifications', async () => {
    const pool = createPool(URL_WITHOUT_TLS, { max: 1 });
    const client = await pool.connect();
    const heard = new Promise((resolve) => client.once('notification', ({ payload }) => resolve(payload)));
    await client.query('LISTEN pool_test');
    const { rows } = await client.query('SELECT repeat($1, 100000) AS text', ['x']);
    expect(rows[0].text).toHaveLength(100_000);
    await client.query("NOTIFY pool_test, 'hello'");
    expect(await heard).toBe('hello');
    client.release();
    await pool.end();
  });
});

test('the end of a connection that nobody listens to does not end the process', async () => {
  const pool = createPool(URL_WITHOUT_TLS, { max: 1 });
  const client = await pool.connect();
  // What a server that goes away makes it say; thrown at us if nobody hears it.
  expect(() => client.emit('error', new Error('terminating connection'))).not.toThrow();
  client.release(true);
  await pool.end();
});

describe('a server with TLS', () => {
  let url = '';
  let certificateFile = '';
  beforeAll(async () => {
    const folder = await folderOfFile();
    certificateFile = join(folder, 'ca.pem');
    await writeFile(certificateFile, CERTIFICATE);
    const postgres = await startPrivatePostgres({ directory: join(folder, 'postgres') });
    atEndOfFile(() => postgres.stop());
    await grantLeast(postgres.url);
    await turnOnTls(postgres.url);
    url = asRelay(postgres.url);
  });

  test.each(['', '?sslmode=prefer', '?sslmode=allow', '?sslmode=require', '?ssl=require', '?ssl=no-verify'])(
    'is reached encrypted with %j',
    async (query) => {
      expect(await isEncrypted(url + query)).toBe(true);
    },
  );

  test('is reached in plain text with sslmode=disable', async () => {
    expect(await isEncrypted(`${url}?sslmode=disable`)).toBe(false);
  });

  test('its certificate is verified where that is asked for', async () => {
    expect(await isEncrypted(`${url}?sslmode=verify-full&sslrootcert=${certificateFile}`)).toBe(true);
    expect(await isEncrypted(`${url}?sslmode=verify-ca&sslrootcert=${certificateFile}`)).toBe(true);
    await expect(isEncrypted(`${url}?sslmode=verify-full`)).rejects.toThrow('self-signed certificate');
    await expect(isEncrypted(`${url}?ssl=true`)).rejects.toThrow('self-signed certificate');
  });

  test('only verify-full insists on the name in the certificate', async () => {
    const byName = url.replace('127.0.0.1', 'localhost');
    expect(await isEncrypted(`${byName}?sslmode=verify-ca&sslrootcert=${certificateFile}`)).toBe(true);
    await expect(isEncrypted(`${byName}?sslmode=verify-full&sslrootcert=${certificateFile}`)).rejects.toThrow(
      'does not match certificate',
    );
  });
});

/** The server writes its own files: it may run as another user than we do. */
async function turnOnTls(url: string): Promise<void> {
  const pool = createPool(url, { max: 1 });
  for (const [name, text] of [
    ['server.crt', CERTIFICATE],
    ['server.key', PRIVATE_KEY],
  ]) {
    await pool.query(
      `COPY (SELECT string_to_table('${text?.trim()}', E'\\n')) TO PROGRAM 'umask 077; cat > ${name}'`,
    );
  }
  await pool.query('ALTER SYSTEM SET ssl = on');
  await pool.query('SELECT pg_reload_conf()');
  // The running session is reloaded as well, and the postmaster before it: new sessions speak TLS from then on.
  await waitFor(async () => (await pool.query('SHOW ssl')).rows[0].ssl === 'on', {
    what: 'the server to speak TLS',
  });
  await pool.end();
}
