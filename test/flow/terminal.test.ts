import { execFile, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { readdir, readFile } from 'node:fs/promises';
import { userInfo } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, onTestFinished, test } from 'vitest';
import { cleanEnvironment } from '../demo/pod.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, setStage } from '../support/flow.ts';
import { createDatabase } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

/** A title, the clipboard, a cleared screen, C1, a direction, what is not seen, and lines of its own. */
const NASTY =
  'A\x1b]0;title\x07\x1b]52;c;aGFjaw==\x07\x1b[2J\x9b31m\u202e\u200b\u{e0041}\x7f\u2066\r\nok      forged\u2028ok      forged';
const SEEN =
  'A\\u001b]0;title\\u0007\\u001b]52;c;aGFjaw==\\u0007\\u001b[2J\\u009b31m\\u202e\\u200b\\udb40\\udc41\\u007f';

const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/u;

test('whatever names and texts hold, nothing of them acts in the terminal of who looks at them, and JSON has the same values', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5' } });
  const row = (columns: Readonly<Record<string, string | boolean | Date>>) => {
    const all = {
      ...{ event_id: randomUUID(), aggregate_id: randomUUID(), payload: JSON.stringify({ text: NASTY }) },
      ...{ event_type: NASTY, aggregate_type: NASTY, topic: NASTY },
      ...columns,
    };
    return stage.pool
      .query(
        `INSERT INTO identity.outbox (${Object.keys(all)}) VALUES (${Object.keys(all).map((_, i) => `$${i + 1}`)}) RETURNING event_id`,
        Object.values(all),
      )
      .then(({ rows }) => rows[0].event_id as string);
  };
  const now = new Date();
  const dead = { error_message: NASTY, dead_lettered_at: now, next_attempt_at: 'infinity' };
  const deadId = await row(dead);
  const discarded = { published: true, discard_reason: NASTY, discarded_by: NASTY, published_at: now };
  const discardedId = await row({ ...dead, ...discarded });
  await row({ published: true, published_at: now, stream_entry_id: '1-1' });
  await row({ attempts: '3', error_message: NASTY, next_attempt_at: new Date(Date.now() + 3_600_000) });
  // A dead letter whose row is gone.
  const prunedId = randomUUID();
  await stage.redis.xadd(
    'identity.user.v1.dlq',
    '*',
    ...[
      'event_id',
      prunedId,
      'original_event_id',
      prunedId,
      'event_type',
      NASTY,
      'aggregate_type',
      NASTY,
      'topic',
      NASTY,
    ],
    ...[
      'aggregate_id',
      randomUUID(),
      'payload',
      JSON.stringify(NASTY),
      'attempts',
      '6',
      'error_message',
      NASTY,
    ],
    ...['created_at', now.toISOString(), 'failed_at', now.toISOString()],
  );
  // Consumers and pods have names, too.
  await stage.redis.xgroup('CREATE', STREAM, NASTY, '$', 'MKSTREAM');
  const facts = {
    pod: NASTY,
    version: NASTY,
    phase: NASTY,
    upSeconds: 1,
    inProgress: 0,
    concurrency: 1,
    tickSecondsAgo: null,
  };
  await stage.redis.hset(
    'bull:relay:pods',
    NASTY,
    `${Date.now()} ${JSON.stringify({ ...facts, protocol: 3 })}`,
  );

  const all = ['--since', '1h', '--until', 'now'];
  const commands: readonly Readonly<{
    args: readonly string[];
    quiet?: boolean;
    env?: Record<string, string>;
  }>[] = [
    { args: ['status'] },
    { args: ['verify', '--since', '1h'] },
    { args: ['republish', ...all, '--dry-run'] },
    { args: ['republish', ...all, '--yes'], env: { SUDO_USER: NASTY } },
    { args: ['dlq', 'list'] },
    { args: ['dlq', 'list', '--pruned'] },
    { args: ['dlq', 'list', '--group'] },
    { args: ['dlq', 'show', deadId] },
    { args: ['dlq', 'show', discardedId] },
    { args: ['dlq', 'show', prunedId] },
    { args: ['dlq', 'replay', '--all', '--dry-run'] },
    { args: ['dlq', 'replay', '--pruned', '--yes'], quiet: true },
    { args: ['dlq', 'discard', '--all', '--dry-run', '--reason', NASTY] },
    { args: ['dlq', 'list', '--topic', NASTY, '--type', NASTY, '--error', NASTY] },
    { args: ['dlq', 'list', '--since', NASTY] },
    { args: ['dlq', NASTY] },
    { args: [NASTY] },
    { args: ['prune', '--older-than', '2h', '--dry-run'], quiet: true },
    { args: ['check'], quiet: true },
    { args: ['check'], env: { RELAY_LOG_LEVEL: NASTY } },
    { args: ['hash-password', NASTY, '--role', 'viewer'] },
    { args: ['grants', '--role', NASTY] },
  ];
  for (const { args, quiet = false, env } of commands) {
    const { lines } = await stage.command(args, env);
    const printed = lines.join('\n');
    const what = `${args.join(' ').replaceAll(NASTY, 'NASTY')}:\n${printed}`;
    // It was printed, and harmless. The first escape is enough where lines are cut.
    if (!quiet) expect(printed, what).toContain(SEEN.slice(0, 20));
    // Who did it is the system's user; the environment is anybody's.
    if (env?.SUDO_USER) expect(printed).toContain(`${userInfo().username} (SUDO_USER: A`);
    for (const line of lines) {
      expect(line, what).not.toMatch(UNPRINTABLE);
      expect(line, what).not.toMatch(/^ok {6}forged/);
    }
  }

  const json = async (...args: string[]) => {
    const { lines } = await stage.command([...args, '--json']);
    const line = lines.find((it) => it.startsWith('{')) ?? '';
    expect(line).not.toMatch(UNPRINTABLE);
    return JSON.parse(line);
  };
  expect((await json('dlq', 'list')).letters[0]).toMatchObject({
    eventType: NASTY,
    topic: NASTY,
    error: NASTY,
  });
  expect((await json('dlq', 'list', '--group')).groups[0].eventTypes).toEqual([NASTY]);
  expect(JSON.parse((await json('dlq', 'show', deadId)).event.payload)).toEqual({ text: NASTY });
  expect(Object.keys((await json('verify', '--since', '1h')).streams)).toContain(NASTY);
  const status = await json('status');
  expect(status.oldest[0]).toMatchObject({ eventType: NASTY, topic: NASTY });
  expect(status.figures.fleet.pods[0]).toMatchObject({ pod: NASTY });

  // A pod's log is looked at in terminals as well.
  const pod = await stage.pod({ RELAY_LOG_LEVEL: 'debug' });
  await row({});
  await waitFor(() => pod.lines.some((line) => line.includes('moved to the dead-letter stream')), {
    what: 'the event to be given up',
  });
  expect(pod.lines.join('\n')).toContain(SEEN.slice(1, 20).replaceAll('\\', '\\'));
  for (const line of pod.lines) expect(line).not.toMatch(UNPRINTABLE);
});

test('commands write to the terminal by one road alone', async () => {
  const folder = join(inject('root'), 'src/commands');
  for (const file of await readdir(folder)) {
    if (file === 'terminal.ts') continue;
    const source = await readFile(join(folder, file), 'utf8');
    // hash-password prompts, and what it prints is in the source.
    const prompts =
      file === 'hash-password.ts' ? /console\.|process\.stdout/ : /console\.|std(out|err)\.write/;
    expect(source, file).not.toMatch(prompts);
  }
});

test('what is listed fits the terminal, ids and names are whole, times have their zone; a pipe has everything', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '0.5' } });
  const long = { eventType: 'X'.repeat(90), topic: 't'.repeat(95) };
  await insertEvents(stage.pool, someEvents(3, 3, long));
  await stage.pool.query(
    `UPDATE identity.outbox SET dead_lettered_at = '2026-01-31T13:14:15.678+01:00', next_attempt_at = 'infinity',
            error_message = repeat('reason ', 200), attempts = 6`,
  );
  await insertEvents(stage.pool, someEvents(2, 2, long));
  await stage.pool.query(
    `UPDATE identity.outbox SET published = true, published_at = now(), stream_entry_id = '1-1'
      WHERE id = (SELECT max(id) FROM identity.outbox)`,
  );
  await stage.redis.xgroup('CREATE', STREAM, 'g'.repeat(300), '$', 'MKSTREAM');
  const { rows } = await stage.pool.query(
    `SELECT event_id AS "eventId", aggregate_id AS "aggregateId", dead_lettered_at IS NOT NULL AS dead
       FROM identity.outbox WHERE NOT published`,
  );
  const ids = (dead: boolean) =>
    rows.filter((it) => it.dead === dead).flatMap((it) => [it.eventId, it.aggregateId]);
  const at = '2026-01-31T12:14:15Z';
  const hour = ['--since', '1h'];
  const cases: readonly [args: readonly string[], short: readonly string[], long: readonly string[]][] = [
    [['dlq', 'list'], [at, 'reason reason', long.eventType, long.topic, ...ids(true)], []],
    [['dlq', 'list', '--group'], [at, 'reason reason', '3  ', long.eventType], []],
    [['dlq', 'replay', '--all', '--dry-run'], [at, 'would be replayed', long.eventType], []],
    [
      ['status'],
      [
        ...ids(false),
        'relay-publish',
        'prioritized 0',
        ' 0 in the last five',
        ', due every 500 ms',
        '0 to read',
        ...[long.eventType, long.topic],
      ],
      ['g'.repeat(300)],
    ],
    [['verify', ...hour], ['unreadable  stream', 'Z to ', long.topic], []],
    [['republish', ...hour, '--until', 'now', '--dry-run'], ['Z to ', long.topic], []],
    [['check'], ['tried, and rolled back'], []],
  ];
  for (const [args, short, whole] of cases) {
    for (const COLUMNS of ['40', '60', '80', '100']) {
      const { lines } = await stage.command(args, { COLUMNS });
      const printed = lines.join('\n');
      // An id or a name alone may be wider than a narrow terminal, which then breaks it; what is copied is whole.
      for (const line of lines)
        if (Number(COLUMNS) >= 80 && line.trim().includes(' '))
          expect([...line].length, printed).toBeLessThanOrEqual(Number(COLUMNS));
      for (const it of short) expect(printed.replaceAll(/\n +/g, ' ')).toContain(it);
    }
    const { lines } = await stage.command(args);
    for (const it of [...short, ...whole]) expect(lines.join('\n')).toContain(it);
  }
});

test('a watch keeps to the rows of the terminal and says what it leaves out; where it has room, that is nothing', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, someEvents(9));
  const env = { ...cleanEnvironment(), ...stage.env, RELAY_REDIS_URL: 'redis://127.0.0.1:9' };
  const watched = async (rows: number) => {
    const command = `stty rows ${rows} cols 80; timeout -s INT 3 "${process.execPath}" dist/cli.js status --watch 0.2`;
    const options = { cwd: inject('root'), env };
    const { stdout } = await promisify(execFile)('script', ['-qc', command, '/dev/null'], options);
    const [, first = ''] = stdout.split('\x1b[H');
    // biome-ignore lint/suspicious/noControlCharactersInRegex: the terminal's own
    return first.replaceAll(/\x1b\[\d*[A-Zm]/g, '').split('\r\n');
  };
  const all = await watched(100);
  const some = await watched(12);
  // The cursor has the last row.
  expect(some).toHaveLength(12);
  // Before the first age.
  expect(some.slice(0, 9)).toEqual(all.slice(0, 9));
  expect(some.slice(10)).toEqual([`… ${all.length - 11} more lines`, '']);
  expect(all.join('\n')).not.toContain('more lines');
  for (const line of all) expect(line.length).toBeLessThanOrEqual(80);
});

test.each([
  ['Ctrl-C at it ends the command without a word', '\x03', 'Password (at least 12 characters):', 130],
  ['Ctrl-D is no answer', '\x04', /characters\):\s+relay: no password was given$/, 1],
])('a question says what it wants, and %s', async (_name, key, shown, exitCode) => {
  const command = `"${process.execPath}" dist/cli.js hash-password alice --role viewer`;
  const child = spawn('script', ['-qec', command, '/dev/null'], {
    ...{ cwd: inject('root'), env: cleanEnvironment() },
  });
  onTestFinished(() => void child.kill('SIGKILL'));
  const ended = once(child, 'close');
  let output = '';
  child.stdout.on('data', (chunk: Buffer) => (output += chunk.toString()));
  await waitFor(() => output.includes('Password (at least 12 characters): '), { what: 'the question' });
  child.stdin.write(key);
  const [code] = await ended;
  if (typeof shown === 'string') expect(output.trim()).toBe(shown);
  else expect(output.trim()).toMatch(shown);
  expect(code).toBe(exitCode);
});

test('relay migrate says in sentences what it has done where a person sees it, elsewhere it logs', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const env = { ...cleanEnvironment(), RELAY_DATABASE_URL: adminUrl };
  const options = { cwd: inject('root'), env };
  const [program, ...args] = [process.execPath, 'dist/cli.js', 'migrate'];
  const { stdout } = await promisify(execFile)(
    'script',
    ['-qec', `"${program}" ${args.join(' ')}`, '/dev/null'],
    options,
  );
  expect(stdout.split('\r\n')).toEqual([
    expect.stringMatching(/^identity\.outbox has all migrations \(applied: (\d+), total: \1\)$/),
    'the wake-up trigger is there (trigger: installed)',
    '',
  ]);
  const log = await promisify(execFile)(program, args, options);
  expect(
    log.stdout
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line).msg),
  ).toEqual(['identity.outbox has all migrations', 'the wake-up trigger is there']);
});

test('progress in a terminal names no time left before it knows one', async () => {
  const { env: servers } = await setStage();
  const options = { cwd: inject('root'), env: { ...cleanEnvironment(), ...servers } };
  const command = `"${process.execPath}" dist/cli.js verify --since 1h`;
  const { stdout } = await promisify(execFile)('script', ['-qec', command, '/dev/null'], options);
  expect(stdout).toMatch(/ 0% \| .* \? left/);
  expect(stdout).not.toMatch(/NF|NULL/);
});

test('check keeps to the columns of a small terminal too', async () => {
  const stage = await setStage({ env: { COLUMNS: '60' } });
  const { lines } = await stage.command(['check']);
  expect(lines.slice(0, 2)).toEqual(['ok      configuration', '        every variable is good']);
  for (const line of lines) expect([...line].length, lines.join('\n')).toBeLessThanOrEqual(60);
});

test('a start that is refused ends with its sentence where a person sees it', async () => {
  const { adminUrl } = await createDatabase({ template: false });
  const { env: servers } = await setStage();
  const options = {
    cwd: inject('root'),
    env: { ...cleanEnvironment(), ...servers, RELAY_DATABASE_URL: adminUrl },
  };
  const command = `"${process.execPath}" dist/cli.js start`;
  const { code, stdout } = (await promisify(execFile)(
    'script',
    ['-qec', command, '/dev/null'],
    options,
  ).catch((error: { code: number; stdout: string }) => error)) as { code: number; stdout: string };
  expect(code).toBe(69);
  const lines = stdout.trim().split('\r\n');
  expect(JSON.parse(lines.at(-2) ?? '').msg).toBe('the relay cannot start');
  expect(lines.at(-1)).toMatch(/^relay: .*identity\.outbox.*: run "relay migrate"/);
});
