import { execFile } from 'node:child_process';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, inject, onTestFinished, test } from 'vitest';
import { VERSION } from '../../src/version.ts';
import { cleanEnvironment } from '../demo/pod.ts';
import { modulesIn } from '../support/bundle.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { startPod } from '../support/pods.ts';
import { createDatabase } from '../support/servers.ts';

/** What the command line says to somebody who asks for something that is not to be had. */

test('a command whose output nobody reads to its end stops without a word', async () => {
  const shell = `"${process.execPath}" dist/cli.js grants | true; exit "\${PIPESTATUS[0]}"`;
  const ended = promisify(execFile)('bash', ['-c', shell], { cwd: inject('root'), env: cleanEnvironment() });
  await expect(ended).rejects.toMatchObject({ code: 141, stderr: expect.not.stringContaining('EPIPE') });
});

test('a command whose output finds no room on the disk says so, without a stack', async () => {
  const shell = `"${process.execPath}" dist/cli.js grants --only sql > /dev/full`;
  const ended = promisify(execFile)('bash', ['-c', shell], { cwd: inject('root'), env: cleanEnvironment() });
  await expect(ended).rejects.toMatchObject({
    code: 1,
    stderr: 'relay: the output cannot be written: ENOSPC: no space left on device, write\n',
  });
});

test('a sentence that helps, each', async () => {
  const stage = await setStage();
  const since = (...args: string[]) => ['republish', ...args];
  const away = { RELAY_REDIS_URL: 'redis://127.0.0.1:9' };
  const cases: readonly [
    args: readonly string[],
    code: number,
    said: RegExp,
    env?: Record<string, string>,
  ][] = [
    [
      since('--since', '2h', '--until', '3h', '--dry-run'),
      1,
      /--since must be earlier than --until, and \S+Z is not before \S+Z/,
    ],
    [since('--since', '1h', '--until', '1h', '--dry-run'), 1, /--since must be earlier/],
    [['verify', '--since', '2h', '--until', '3h'], 1, /--since must be earlier/],
    [
      ['verify', '--since', 'yesterday'],
      1,
      /^relay: .*'yesterday' is invalid\. Expected how long ago \(90s, 15m, 2h, 7d; a number alone is seconds\), "now", a day \(2026-01-31, UTC\), or a time with its zone \(2026-01-31T12:00:00Z\)/,
    ],
    // What a guess would make another time of.
    [['verify', '--since', 'in 1 hour'], 1, /Expected how long ago/],
    [['verify', '--since', '2026-01-31T12:00:00'], 1, /Expected how long ago/],
    [['verify', '--since', '2026-02-30T12:00:00+25:00'], 1, /Expected how long ago/],
    [['verify', '--since', '2026-02-30'], 1, /Expected how long ago/],
    [['verify', '--since', '2026-02-30T12:00:00Z'], 1, /Expected how long ago/],
    [['verify', '--since', '0000-01-01'], 1, /Expected how long ago/],
    [['prune', '--older-than', '999999999d', '--dry-run'], 1, /Expected how long ago/],
    [['verify', '--since', '2024-02-29'], 0, /No row has an entry id/],
    [['verify', '--since', '0001-01-01T00:00:00Z'], 0, /No row has an entry id/],
    [['verify', '--since', '2026-01-31'], 0, /No row has an entry id/],
    [['verify', '--since', '2026-01-31T12:00:00+05:30'], 0, /No row has an entry id/],
    [
      ['dlq', 'discard', '--all', '--reason', 'x', '--yes'],
      0,
      /^There is nothing to discard: no dead letter is there\.$/m,
    ],
    [
      ['dlq', 'replay', '--type', 'X', '--dry-run'],
      0,
      /^There is nothing to replay: no dead letter matches\.$/m,
    ],
    // Said before a server is asked.
    [['dlq', 'replay'], 1, /^relay: name events, use filters, or say --all/, away],
    [['dlq', 'discard', '--reason', 'x'], 1, /^relay: name events, use filters, or say --all/, away],
    // A variable of a script that is not set: every error contains it.
    [
      ['dlq', 'discard', '--error', '', '--reason', 'x', '--yes'],
      1,
      /^relay: option '--error <text>' argument '' is invalid\. Expected some words\./,
      away,
    ],
    [['dlq', 'list', '--group', '--pruned'], 1, /^relay: --group counts rows/, away],
    [['dlq', 'list', '--since', '2h', '--until', '3h'], 1, /^relay: --since must be earlier/, away],
    [['check'], 0, /^relay: RELAY_FOO is no variable of the relay and has no effect$/m, { RELAY_FOO: '1' }],
    [
      ['dlq', 'list'],
      0,
      /RELAY_STREAM_NAM is no variable .*: is RELAY_STREAM_NAME meant\?/,
      { RELAY_STREAM_NAM: 'x' },
    ],
    [['hash-password', 'alice'], 1, /--role viewer \(look\), or --role operator \(replay/],
    [['status', '--nonsense'], 1, /^relay: unknown option '--nonsense'/],
    [['dlq', 'show'], 1, /^relay: missing required argument 'event-id'/],
    [
      ['status'],
      78,
      /^relay: the configuration is wrong:\n {2}RELAY_BATCH_SIZE: /,
      { RELAY_BATCH_SIZE: 'many' },
    ],
    [['--version'], 0, new RegExp(`^${VERSION.replaceAll('.', '\\.')}$`, 'm')],
    [['help', 'verify'], 0, /--repair/],
    [['help', 'dlq', 'replay'], 0, /^Usage: relay dlq replay /],
    [['help', 'dlq', 'nonsense'], 1, /^relay: unknown command 'nonsense'[\s\S]*See "relay --help"/],
    [['verfy'], 1, /^relay: unknown command 'verfy'[\s\S]*Did you mean verify[\s\S]*See "relay --help"/],
    [['verify', '--help'], 0, /seconds\) \(required\)\n +--until <when> +up to then \(default: now\)$/m],
    [['dlq', 'discard', '--help'], 0, /--reason .*\(required\)/],
    // Those that matter to it, not those of publishing.
    [['board', '--help'], 0, /RELAY_BOARD_USERS(?![\s\S]*RELAY_BATCH_SIZE)/],
    [['check', '--help'], 0, /Exits 0 if none has failed, 1 if one has,\n78/],
    [
      ['dlq', 'discard', '--all'],
      1,
      /^relay: required option '--reason <text>' not specified\nSee "relay --help"/,
    ],
  ];
  for (const [args, code, said, env] of cases) {
    const result = await stage.command(args, env);
    const printed = result.lines.join('\n');
    expect(printed, args.join(' ')).toMatch(said);
    expect(result.code, `${args.join(' ')}:\n${printed}`).toBe(code);
  }
});

test('before relay migrate every command says what to do, and names no figure that it does not have', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const stage = await setStage({ databaseUrl: adminUrl });
  for (const args of [
    ['status'],
    ['check'],
    ['dlq', 'list'],
    ['verify', '--since', '1h'],
    ['republish', '--since', '1h', '--until', 'now', '--dry-run'],
  ]) {
    const { code, lines } = await stage.command(args);
    const printed = lines.join('\n');
    expect([1, 69], printed).toContain(code);
    expect(printed).toContain('run "relay migrate"');
    expect(printed).not.toMatch(/no answer/);
  }
});

test('a server that takes no changes is one that is not ready, in words and exit code', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, someEvents(2));
  await stage.pool.query('UPDATE identity.outbox SET attempts = 1, dead_lettered_at = now()');
  const said = async (...args: string[]) => {
    const { code, lines } = await stage.command(args);
    return [code, lines.at(-1)];
  };
  await stage.redis.replicaof('127.0.0.1', 1);
  expect(await said('own', '--yes')).toEqual([
    69,
    expect.stringMatching(/^relay: Redis refuses changes now: READONLY You can't write/),
  ]);
  await stage.redis.replicaof('NO', 'ONE');
  const { rows } = await stage.pool.query<{ name: string }>('SELECT current_database() AS name');
  await stage.pool.query(`ALTER DATABASE ${rows[0]?.name} SET default_transaction_read_only = on`);
  expect(await said('dlq', 'replay', '--all', '--yes')).toEqual([
    69,
    expect.stringMatching(/^relay: no session can write/),
  ]);
  expect(await said('migrate')).toEqual([
    69,
    'relay: PostgreSQL refuses changes: let RELAY_DATABASE_URL lead to the primary ' +
      '(cannot execute ALTER TABLE in a read-only transaction)',
  ]);
});

test('a table that a session keeps locked is no failure of the command, and check names the session', async () => {
  const stage = await setStage();
  const session = await stage.pool.connect();
  onTestFinished(() => session.release(true));
  const { rows } = await session.query<{ pid: number }>('SELECT pg_backend_pid() AS pid');
  const keep = (mode: string) => session.query(`ROLLBACK; BEGIN; LOCK TABLE identity.outbox IN ${mode} MODE`);
  await keep('SHARE');
  const { code, lines } = await stage.command(['check']);
  expect(code).toBe(1);
  expect(lines.find((line) => line.startsWith('failed'))).toMatch(
    new RegExp(`claim .*waited 4 s for the lock on identity.outbox, which process ${rows[0]?.pid} of`),
  );
  await keep('ACCESS EXCLUSIVE');
  const listed = await stage.command(['dlq', 'list']);
  expect([listed.code, listed.lines.at(-1)]).toEqual([
    69,
    'relay: PostgreSQL did not do this in time: canceling statement due to statement timeout',
  ]);
});

test('a database that is not there is no server that cannot be reached', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const nowhere = new URL(adminUrl);
  nowhere.pathname = '/nowhere';
  const { exited, lines } = await startPod({ RELAY_DATABASE_URL: nowhere.href }, ['migrate']);
  expect((await exited).code).toBe(69);
  expect(lines.at(-1)).toBe(
    'relay: PostgreSQL refuses the connection (see RELAY_DATABASE_URL): database "nowhere" does not exist',
  );
});

test('relay migrate --grants says which roles to create, and what it has done without them', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const { exited, lines } = await startPod({ RELAY_DATABASE_URL: adminUrl }, ['migrate', '--grants']);
  expect((await exited).code).toBe(1);
  expect(lines.at(-1)).toMatch(
    /^relay: the table is migrated, but no rights were given: --grants needs the roles relay, relay_operator and producer \("relay grants" takes other names\): role "\w+" does not exist$/,
  );
});

test('progress that comes to its end says 100 %', async () => {
  const stage = await setStage();
  await stage.pod();
  await insertEvents(stage.pool, someEvents(20));
  await stage.rested();
  for (const args of [
    ['verify', '--since', '1h'],
    ['republish', '--since', '1h', '--until', 'now', '--yes'],
  ]) {
    const { lines } = await stage.command(args);
    expect(lines.filter((line) => line.includes('%')).at(-1), lines.join('\n')).toMatch(/ 100% /);
  }
});

test('a command whose role lacks a right says nothing but that, no progress', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, someEvents(3));
  await stage.pool.query(
    `UPDATE identity.outbox SET dead_lettered_at = now(), next_attempt_at = 'infinity', error_message = 'x'`,
  );
  const { RELAY_DATABASE_URL } = stage.env;
  const args = ['dlq', 'replay', '--all', '--yes'];
  const { code, lines } = await stage.command(args, { RELAY_DATABASE_URL });
  expect([code, lines]).toEqual([1, [expect.stringMatching(/^relay: the role .* lacks a right/)]]);
});

test('every help fits a terminal of 80 columns', async () => {
  const cli = join(inject('root'), 'dist/cli.js');
  const help = async (...names: string[]): Promise<string[]> => {
    const { stdout } = await promisify(execFile)(process.execPath, [cli, ...names, '--help'], {
      env: cleanEnvironment(),
    });
    const lines = stdout.split('\n');
    expect(
      lines.filter((line) => line.length > 80),
      names.join(' '),
    ).toEqual([]);
    const [, ...rows] = lines.slice(Math.max(0, lines.indexOf('Commands:')));
    const commands = lines.includes('Commands:')
      ? rows.flatMap((row) => /^ {2}([a-z-]+)/.exec(row)?.[1] ?? [])
      : [];
    return commands.filter((name) => name !== 'help');
  };
  const commands = await help();
  expect(commands).toContain('dlq');
  for (const name of commands) for (const part of await help(name)) await help(name, part);
});

test('help and version load neither a client of a server nor a command', async () => {
  const coverage = await mkdtemp(join(tmpdir(), 'relay-loaded-'));
  onTestFinished(() => rm(coverage, { recursive: true }));
  const cli = join(inject('root'), 'dist/cli.js');
  for (const args of [['--help'], ['--version'], []])
    await promisify(execFile)(process.execPath, [cli, ...args], {
      env: { ...cleanEnvironment(), NODE_V8_COVERAGE: coverage },
    }).catch((error) => expect(error.code).toBe(1)); // no command: help, on stderr
  const files = new Set<string>();
  for (const file of await readdir(coverage)) {
    const { result } = JSON.parse(await readFile(join(coverage, file), 'utf8'));
    for (const { url } of result) if (url.startsWith('file:')) files.add(fileURLToPath(url));
  }
  const loaded = new Set((await Promise.all([...files].map(modulesIn))).flat());
  expect([...loaded].toSorted()).toEqual([
    ...['commander', 'picocolors', 'src/cli.ts', 'src/commands/signals.ts', 'src/commands/terminal.ts'],
    ...['src/config/printable.ts', 'src/version.ts'],
  ]);
});
