import { exec, spawnSync } from 'node:child_process';
import { symlink, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { expect, inject, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { type Program, startProgram } from '../support/program.ts';
import { blocksUnder } from '../support/readme.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const root = inject('root');
const GROUP = 'mailer';
const MODULES = 'import psycopg2, redis';
/** Debian's packages belong to Debian's Python, which need not be the first on the PATH. */
const python = ['python3', '/usr/bin/python3'].find(
  (command) => spawnSync(command, ['-c', MODULES]).status === 0,
);

type Start = (env: Readonly<Record<string, string>>) => Program;
const typescript: Start = (env) =>
  startProgram(process.execPath, ['--import', 'tsx', join(root, 'docs/examples/consumer.ts')], env);
const pythonic: Start = (env) =>
  startProgram(python ?? 'python3', [join(root, 'docs/examples/consumer.py')], env);

function consumerOn(stage: Stage, start: Start, group = GROUP): (name: string) => Program {
  return (name) =>
    start({
      ...{ REDIS_URL: stage.server.adminUrl, DATABASE_URL: stage.databaseUrl },
      ...{ STREAM, GROUP: group, CONSUMER: name, CLAIM_IDLE_MS: '1000' },
    });
}

const patiently = (what: string) => ({ what });

async function pending(stage: Stage, group = GROUP): Promise<number> {
  const [count] = (await stage.redis.xpending(STREAM, group)) as [number];
  return count;
}

/** How many mails each event led to; an event without a mail is not there. */
async function mailsPerEvent(stage: Stage): Promise<Map<string, number>> {
  const { rows: tables } = await stage.pool.query(
    `SELECT 1 WHERE to_regclass('mailer.mails') IS NOT NULL AND to_regclass('mailer.handled_events') IS NOT NULL`,
  );
  // The consumer makes its tables first.
  if (tables.length === 0) return new Map();
  const { rows } = await stage.pool.query<{ event_id: string; mails: number }>(
    'SELECT event_id::text, count(*)::int AS mails FROM mailer.mails GROUP BY event_id',
  );
  return new Map(rows.map(({ event_id, mails }) => [event_id, mails]));
}

async function survives(start: Start): Promise<void> {
  const stage = await setStage();
  await stage.pod();
  const startConsumer = consumerOn(stage, start);
  const events = someEvents(30, 10);
  const insert = async (from: number, to: number) => {
    await insertEvents(stage.pool, events.slice(from, to));
    await stage.rested();
  };
  const allMailed = async (upTo: number) => {
    const handled = async () =>
      (await mailsPerEvent(stage)).size === upTo && (await pending(stage)) === 0 ? 'all' : undefined;
    await waitFor(handled, patiently(`a mail for each of ${upTo} events, and nothing pending`));
  };

  // The first one dies in the middle of an event, with the others of its batch pending.
  const first = startConsumer('first');
  await insert(0, 10);
  await allMailed(10);
  const blocker = await stage.pool.connect();
  await blocker.query('BEGIN; LOCK TABLE mailer.mails IN ACCESS EXCLUSIVE MODE');
  await insert(10, 20);
  await waitFor(
    async () => (await pending(stage)) >= 1,
    patiently('entries in the hands of the first consumer'),
  );
  await first.kill('SIGKILL');
  await blocker.query('COMMIT');
  blocker.release();
  // One of what it left was trimmed meanwhile: nobody can handle that, and it stops nobody.
  const trimmed = (await stage.entries()).find(({ fields }) => fields.event_id === events[19]?.eventId);
  expect(await stage.redis.xdel(STREAM, trimmed?.entryId ?? '')).toBe(1);

  // Another one, by another name, takes over what it left.
  const second = startConsumer('second');
  await allMailed(19);

  // The same event once more, as after a replay or a loss of Redis' data.
  const [again] = await stage.entries();
  const fields = Object.entries(again?.fields ?? {}).flat();
  await stage.redis.xadd(STREAM, '*', ...fields);
  const known = () => second.lines.some((line) => line.endsWith('was handled before'));
  await waitFor(known, patiently('the copy to be recognised'));

  // A restart in good order, and one after the group was lost.
  expect((await second.kill('SIGTERM')).code).toBe(0);
  await insert(20, 25);
  const third = startConsumer('second');
  await allMailed(24);
  await stage.redis.xgroup('DESTROY', STREAM, GROUP);
  await insert(25, 30);
  const groupIsBack = async () => {
    const groups = (await stage.redis.xinfo('GROUPS', STREAM)) as unknown[];
    return groups.length === 1;
  };
  await waitFor(groupIsBack, patiently('the group to be made again'));
  await allMailed(29);
  expect((await third.kill('SIGTERM')).code).toBe(0);

  const mails = await mailsPerEvent(stage);
  expect([...mails.values()].filter((count) => count !== 1)).toEqual([]);
  const [lost, ...others] = [events[19], ...events.filter((_, i) => i !== 19)].map((it) => it?.eventId ?? '');
  expect([...mails.keys()].toSorted()).toEqual(others.toSorted());
  expect(mails.has(lost ?? '')).toBe(false);
}

/** Where nobody set a URL. No PostgreSQL is at this port, so neither writes to a Redis of the machine. */
async function startsWithoutUrls(start: Start): Promise<void> {
  const consumer = start({ PGHOST: '127.0.0.1', PGPORT: '1', CONSUMER: 'host' });
  const tries = () => consumer.lines.filter((line) => /127\.0\.0\.1(?::|", port )1\b/.test(line)).length > 1;
  await waitFor(tries, patiently('a second try of the connection to PostgreSQL'));
  expect(consumer.lines[0]).toBe('reading identity.user.v1 as mailer/host');
  expect(consumer.lines.join('\n')).not.toContain('Traceback');
  expect((await consumer.kill('SIGTERM')).code).toBe(0);
}

/** Two groups that keep what they have handled in one database. */
async function handlesForEachGroup(start: Start): Promise<void> {
  const stage = await setStage();
  await stage.pod();
  const events = someEvents(5, 2);
  await insertEvents(stage.pool, events);
  await stage.rested();
  for (const [i, group] of [GROUP, 'welcome'].entries()) {
    const consumer = consumerOn(stage, start, group)('one');
    // It prints a line for each event once its transaction is committed.
    const handled = () =>
      events.every(({ eventId }) => consumer.lines.some((line) => line.includes(eventId)));
    await waitFor(handled, patiently(`${group} to be through with ${events.length} events`));
    await waitFor(async () => (await pending(stage, group)) === 0, patiently(`nothing pending for ${group}`));
    expect((await consumer.kill('SIGTERM')).code).toBe(0);
    const mails = await mailsPerEvent(stage);
    expect([...mails.values()], `after ${group}`).toEqual(events.map(() => i + 1));
  }
}

test('the TypeScript consumer handles each event for each group of a database', async () => {
  await handlesForEachGroup(typescript);
});

test.skipIf(python === undefined && !process.env.CI)(
  'the Python consumer handles each event for each group of a database',
  async () => {
    await handlesForEachGroup(pythonic);
  },
);

test('the TypeScript consumer says what it reads, and tries again while it finds no server', async () => {
  await startsWithoutUrls(typescript);
});

test.skipIf(python === undefined && !process.env.CI)(
  'the Python consumer says what it reads, and tries again while it finds no server',
  async () => {
    await startsWithoutUrls(pythonic);
  },
);

test('the TypeScript consumer handles each event once, through kill -9, copies, restarts and a lost group', async () => {
  await survives(typescript);
});

test.skipIf(python === undefined && !process.env.CI)(
  'the Python consumer handles each event once, through kill -9, copies, restarts and a lost group',
  async () => {
    expect(python, `a python3 that can ${MODULES}`).toBeDefined();
    await survives(pythonic);
  },
);

test('the consumer in the README prints the event that the README inserts, and goes on after a restart', async () => {
  const stage = await setStage();
  await stage.pod();
  const [sample = ''] = blocksUnder('README.md', 'Read events', 'ts');
  const folder = await folderOfFile();
  await symlink(join(root, 'node_modules'), join(folder, 'node_modules'));
  await writeFile(join(folder, 'consumer.ts'), sample);
  // As the README says, but with the project's modules, and with the Redis of the test.
  const [commands = ''] = blocksUnder('README.md', 'Read events', 'sh');
  const [prepare = '', run = ''] = commands.split('\n');
  const [withoutInstall = '', installed] = prepare.split(' && npm install ');
  expect(installed).toBe('ioredis tsx');
  await promisify(exec)(withoutInstall, { cwd: folder });
  const command = run.replace(/^REDIS_URL=\S+ /, 'exec ');
  const startWith = (env: Record<string, string>) =>
    startProgram('sh', ['-c', `cd "$FOLDER" && ${command}`], { ...env, FOLDER: folder });
  const start = () => startWith({ REDIS_URL: stage.server.adminUrl, HOSTNAME: 'reader' });

  const without = startWith({});
  await waitFor(
    () => without.lines.some((line) => line.includes('REDIS_URL is not set')),
    patiently('what is missing to be said'),
  );
  const consumer = start();
  const printed = (program: Program, text: string) => () => program.lines.some((line) => line.includes(text));
  const [insert = ''] = blocksUnder('README.md', 'Run it', 'sql');
  await stage.pool.query(insert);
  await waitFor(printed(consumer, 'UserRenamed'), patiently('the event to be printed'));
  await consumer.kill('SIGKILL');

  const later = anEvent();
  await insertEvents(stage.pool, [later]);
  const restarted = start();
  await waitFor(printed(restarted, later.eventId), patiently('the later event to be printed'));
});
