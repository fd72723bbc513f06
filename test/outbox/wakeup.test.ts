import type pg from 'pg';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { Pool } from '../../src/connections/database.ts';
import { createGeneration } from '../../src/connections/generation.ts';
import {
  createWakeup,
  hasWakeup,
  installWakeup,
  removeWakeup,
  type Wakeup,
} from '../../src/outbox/wakeup.ts';
import { anEvent, insertEvents } from '../support/events.ts';
import { asRelay, PRODUCER_ROLE } from '../support/least-privilege.ts';
import { createDatabase } from '../support/servers.ts';
import { type AdminPool, openAdminPool, openPool, silent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const CHANNEL = 'relay_outbox';
/** What the session that listens calls itself. */
const LISTENER = 'relay-service wake-up';

let pool: AdminPool;
/** The trigger runs with the rights of whoever writes. */
let producers: pg.Pool;
let databaseUrl: string;
const wakeups: Wakeup[] = [];

beforeAll(async () => {
  const { url, adminUrl } = await createDatabase();
  databaseUrl = url;
  pool = openAdminPool(adminUrl);
  producers = openPool(asRelay(url, PRODUCER_ROLE));
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox');
});

afterEach(async () => {
  await Promise.all(wakeups.splice(0).map((it) => it.stop()));
});

/** A relay's wake-up at work; `wakes` counts how often it was woken. */
async function startWakeup(through: Pool = openPool(databaseUrl), logger = silent) {
  const heard = { wakes: 0 };
  const wakeup = createWakeup({
    ...{ pool: through, generation: createGeneration() },
    logger,
    onWake: () => heard.wakes++,
  });
  wakeups.push(wakeup);
  wakeup.start();
  await waitFor(() => heard.wakes > 0, { what: 'the relay to listen' });
  heard.wakes = 0;
  return { ...wakeup, heard };
}

/** Somebody else who listens: what he hears is what the writers said. */
async function startEar() {
  const client = await openPool(databaseUrl).connect();
  const said: string[] = [];
  client.on('notification', ({ payload = '' }) => said.push(payload));
  await client.query(`LISTEN ${CHANNEL}`);
  return {
    /** Notifications so far, by everybody. They arrive in order, so nothing is missed before our own. */
    async heard(): Promise<number> {
      const mark = `mark ${said.length}`;
      await pool.query('SELECT pg_notify($1, $2)', [CHANNEL, mark]);
      await waitFor(() => said.includes(mark), { what: 'our own notification' });
      return said.splice(0).length - 1;
    },
  };
}

const insert = (db: pg.Pool | pg.ClientBase = producers) => insertEvents(db, [anEvent()]);
const terminateListener = () =>
  pool.query('SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1', [
    LISTENER,
  ]);
const locksHeld = async () =>
  (
    await pool.query(
      `SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
    )
  ).rowCount;

describe('writers', () => {
  test('say nothing while the relay is awake', async () => {
    await startWakeup();
    const ear = await startEar();
    await insert();
    await insert();
    expect(await ear.heard()).toBe(0);
  });

  test('say nothing while no relay runs', async () => {
    const ear = await startEar();
    await insert();
    expect(await ear.heard()).toBe(0);
  });

  test('wake the relay once it is armed, and are quiet again from then on', async () => {
    const relay = await startWakeup();
    const ear = await startEar();
    expect(await relay.arm()).toBe('armed');
    await insert();
    await waitFor(() => relay.heard.wakes === 1, { what: 'the relay to wake up' });
    await waitFor(async () => (await locksHeld()) === 0, { what: 'the relay to be disarmed' });
    await insert();
    expect(await ear.heard()).toBe(1);
    expect(relay.heard.wakes).toBeLessThanOrEqual(2); // one more is our own mark
  });

  test('wake it up at their commit, not before, and not at all when they roll back', async () => {
    const relay = await startWakeup();
    const ear = await startEar();
    await relay.arm();
    const writer = await producers.connect();
    await writer.query('BEGIN');
    await insert(writer);
    await writer.query('ROLLBACK');
    expect(await ear.heard()).toBe(0);
    await waitFor(async () => (await relay.arm()) === 'armed', { what: 'the relay to be armed again' });
    await writer.query('BEGIN');
    await insert(writer);
    expect(relay.heard.wakes).toBeLessThanOrEqual(1); // our own mark
    await writer.query('COMMIT');
    writer.release();
    expect(await ear.heard()).toBe(1);
  });

  test('say one thing in one transaction, however many rows and statements it has', async () => {
    const relay = await startWakeup();
    const ear = await startEar();
    await relay.arm();
    const writer = await producers.connect();
    await writer.query('BEGIN');
    for (let i = 0; i < 5; i++) await insertEvents(writer, [anEvent(), anEvent()]);
    await writer.query('COMMIT');
    writer.release();
    expect(await ear.heard()).toBe(1);
  });

  test('never fail and never go unseen, many at once, while the relay falls asleep and wakes up', async () => {
    const WRITERS = 12;
    const INSERTS = 25;
    const relay = await startWakeup();
    const taken = new Set<string>();
    const take = async () => {
      const { rows } = await pool.query(
        `UPDATE identity.outbox SET next_attempt_at = 'infinity' WHERE next_attempt_at IS NULL RETURNING id`,
      );
      for (const { id } of rows) taken.add(id);
    };
    const writers = Array.from({ length: WRITERS }, async () => {
      for (let i = 0; i < INSERTS; i++) await insert();
    });
    // What the claim worker does; it sleeps only when the protocol allows it, and nothing but a notification wakes it.
    while (taken.size < WRITERS * INSERTS) {
      const { wakes } = relay.heard;
      await take();
      if ((await relay.arm()) !== 'armed') continue;
      await take();
      if (taken.size === WRITERS * INSERTS) break;
      await waitFor(() => relay.heard.wakes > wakes, {
        what: 'a writer to wake the relay',
        timeoutMs: 5_000,
      });
    }
    await Promise.all(writers);
    expect(taken.size).toBe(WRITERS * INSERTS);
  });
});

describe('arming', () => {
  test('has to wait for a writer that said nothing and has yet to commit', async () => {
    const relay = await startWakeup();
    const writer = await producers.connect();
    await writer.query('BEGIN');
    await insert(writer);
    expect(await relay.arm()).toBe('writers');
    expect(await relay.arm()).toBe('writers');
    await writer.query('COMMIT');
    writer.release();
    expect(await relay.arm()).toBe('armed');
  });

  test('is done once for all pods, and all of them are woken', async () => {
    const [one, other] = [await startWakeup(), await startWakeup()];
    expect(await one.arm()).toBe('armed');
    expect(await one.arm()).toBe('already-armed');
    expect(await other.arm()).toBe('already-armed');
    await insert();
    await waitFor(() => one.heard.wakes > 0 && other.heard.wakes > 0, { what: 'both to wake up' });
    await waitFor(async () => (await other.arm()) === 'armed', { what: 'the other to be armed' });
    expect(await one.arm()).toBe('already-armed');
  });

  test('ends with the connection: another pod is armed in its place', async () => {
    const dying = await startWakeup();
    const other = await startWakeup();
    expect(await dying.arm()).toBe('armed');
    await pool.query(
      `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
    );
    await waitFor(async () => (await other.arm()) === 'armed', { what: 'the other to be armed' });
    await insert();
    await waitFor(() => other.heard.wakes > 0, { what: 'the other to wake up' });
  });

  test('ends with the relay', async () => {
    const relay = await startWakeup();
    await relay.arm();
    expect(await locksHeld()).toBe(1);
    await relay.stop();
    expect(await relay.arm()).toBe('deaf');
    await waitFor(async () => (await locksHeld()) === 0, { what: 'the lock to be gone' });
    const ear = await startEar();
    await insert();
    expect(await ear.heard()).toBe(0);
  });

  test('in one database has nothing to do with another', async () => {
    const elsewhere = await startWakeup(openPool((await createDatabase()).url));
    expect(await elsewhere.arm()).toBe('armed');
    const relay = await startWakeup();
    const writer = await producers.connect();
    await writer.query('BEGIN');
    await insert(writer);
    expect(await relay.arm()).toBe('writers');
    await writer.query('COMMIT');
    writer.release();
    expect(await relay.arm()).toBe('armed');
    await insert();
    await waitFor(() => relay.heard.wakes > 0, { what: 'the relay to wake up' });
    expect(elsewhere.heard.wakes).toBe(0);
  });
});

describe('the listening connection', () => {
  test('is deaf before the start, and while it is lost; it comes back, and looks what it has missed', async () => {
    const through = openPool(databaseUrl);
    const never = createWakeup({
      ...{ pool: through, generation: createGeneration() },
      logger: silent,
      onWake: () => {},
    });
    expect(await never.arm()).toBe('deaf');
    const relay = await startWakeup(through);
    expect(await relay.arm()).toBe('armed');
    await terminateListener();
    await waitFor(async () => (await relay.arm().catch(() => 'deaf')) === 'deaf', { what: 'it to be deaf' });
    await insert();
    await waitFor(() => relay.heard.wakes > 0, { what: 'it to be back and to look' });
    expect(await relay.arm()).toBe('armed');
    relay.heard.wakes = 0;
    await insert();
    await waitFor(() => relay.heard.wakes > 0, { what: 'it to hear again' });
  });

  test('says once that its session has ended, and when notifications arrive again', async () => {
    const said: string[] = [];
    const tell = (_: unknown, message: string) => void said.push(message);
    await startWakeup(undefined, { ...silent, warn: tell, info: tell });
    await terminateListener();
    await waitFor(() => said.length >= 2, { what: 'both lines' });
    expect(said).toEqual([
      'lost the connection that listens for new events; polling until it is back',
      'notifications of new events arrive again',
    ]);
  });

  test('is deaf behind a pooler that lets no notification through, and still stops at once', async () => {
    const through = openPool(databaseUrl);
    let listens = 0;
    const pooler: Pool = {
      connect: (async () => {
        const client = await through.connect();
        const query = (config: { text: string }) => {
          if (!config.text.startsWith('LISTEN')) return through.query(config);
          listens++;
          return through.query('SELECT 1');
        };
        return Object.create(client, { query: { value: query } });
      }) as Pool['connect'],
    };
    let wakes = 0;
    const relay = createWakeup({
      ...{ pool: pooler, generation: createGeneration() },
      logger: silent,
      onWake: () => wakes++,
    });
    wakeups.push(relay);
    relay.start();
    await waitFor(() => listens > 0, { what: 'it to try' });
    expect(await relay.arm()).toBe('deaf');
    await insert();
    const stopping = relay.stop();
    await waitFor(() => stopping.then(() => true), { what: 'it to stop', timeoutMs: 4_000 });
    expect(wakes).toBe(0);
  });

  test('may be started and stopped any number of times', async () => {
    const relay = await startWakeup();
    relay.start();
    await Promise.all([relay.stop(), relay.stop()]);
    relay.start();
    await waitFor(() => relay.heard.wakes > 0, { what: 'it to listen again' });
    expect(await relay.arm()).toBe('armed');
    await relay.stop();
  });
});

test('the trigger is installed and removed any number of times', async () => {
  // By an admin: it is the owner's, who migrates.
  expect(await removeWakeup(pool)).toBe('removed');
  expect(await hasWakeup(pool)).toBe(false);
  expect(await removeWakeup(pool)).toBe('absent');
  await insert();
  expect(await installWakeup(pool)).toBe('installed');
  expect(await installWakeup(pool)).toBe('present');
  expect(await hasWakeup(pool)).toBe(true);
  const relay = await startWakeup();
  await relay.arm();
  await insert();
  await waitFor(() => relay.heard.wakes > 0, { what: 'the relay to wake up' });
});
