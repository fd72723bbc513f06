import { Worker } from 'bullmq';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createOutbox, type Outbox } from '../../src/outbox/outbox.ts';
import { createQueues, publishQueueName, type Queues } from '../../src/queue/queues.ts';
import { WORKER_CONNECTION } from '../../src/queue/worker.ts';
import type { Failure } from '../../src/triage/dead-letter.ts';
import type { Found } from '../../src/triage/lost-jobs.ts';
import { createReconcile } from '../../src/triage/reconcile.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { createDatabase, createRedis, type TestRedis } from '../support/servers.ts';
import {
  type AdminPool,
  type AdminRedis,
  openAdminPool,
  openAdminRedis,
  openPool,
  openRedis,
  readRows,
  readStates,
  silent,
} from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

let pool: AdminPool;
let server: TestRedis;
let redis: AdminRedis;
let outbox: Outbox;
let queues: Queues;

beforeAll(async () => {
  const database = await createDatabase();
  server = await createRedis();
  pool = openAdminPool(database.adminUrl);
  redis = openAdminRedis(server.adminUrl);
  outbox = createOutbox(openPool(database.url), {
    ...{
      ordering: 'aggregate',
      deadLetterPolicy: 'continue',
      claimLeaseMs: 60_000,
      maxEventBytes: 1_048_576,
    },
    ...{ streamName: 'identity.user.v1', statementTimeoutMs: 10_000 },
  });
  const options = { queuePrefix: 'bull', queueName: 'relay', maxRetryAttempts: 0, retryBaseDelayMs: 10 };
  queues = createQueues(openRedis(server.url), options, silent);
});

beforeEach(async () => {
  await pool.query('TRUNCATE identity.outbox RESTART IDENTITY');
  await redis.flushall();
});

const dead: Failure[] = [];
/** What is in the streams, by event id. */
const entries = new Map<string, Found>();

const reconcile = (deps: Partial<Parameters<typeof createReconcile>[0]> = {}) =>
  createReconcile({
    transaction: (work) => outbox.transaction('repeatable', work as never),
    ...{ lockDue: outbox.lockDue, returnToFresh: outbox.returnToFresh, extendLease: outbox.extendLease },
    ...{ jobFate: queues.jobFate, failedJob: queues.failedJob },
    deadLetter: async (failure) => void dead.push(failure),
    appended: async () => entries,
    settle: async (found) => {
      await outbox.transaction('durable', (tx) => outbox.markPublished(tx, found));
    },
    logger: silent,
    ...(deps as object),
  } as Parameters<typeof createReconcile>[0])();

/** Rows that were claimed and whose lease is over, with their jobs. */
async function overdue(count: number): Promise<OutboxEvent[]> {
  await insertEvents(pool, someEvents(count));
  const events: OutboxEvent[] = [];
  while (events.length < count) {
    const { leased } = await outbox.transaction('repeatable', (tx) => outbox.claimFresh(tx, 1_000));
    events.push(...leased);
  }
  await queues.addPublishJobs(events);
  await pool.query(`UPDATE identity.outbox SET next_attempt_at = now() - interval '1 s'`);
  return events;
}

async function letFail(reason: string): Promise<void> {
  const worker = new Worker(publishQueueName('relay'), () => Promise.reject(new Error(reason)), {
    connection: openRedis(server.url, WORKER_CONNECTION),
  });
  await waitFor(async () => (await queues.inFlight()).total === 0, { what: 'the jobs to fail' });
  await worker.close();
}

describe('a row whose lease has ended', () => {
  test('is published when its job is gone, but its entry is in the stream', async () => {
    const [first, second] = (await overdue(2)) as [OutboxEvent, OutboxEvent];
    for (const event of [first, second]) await queues.remove(event.eventId);
    entries.set(first.eventId, { entryId: '1700000000000-5' });
    await reconcile();
    entries.clear();
    expect(await readRows(pool)).toMatchObject([
      { state: 'published', streamEntryId: '1700000000000-5' },
      { state: 'fresh' },
    ]);
  });

  test('gets another when its job is alive', async () => {
    await overdue(2);
    await reconcile();
    expect(await readStates(pool)).toEqual(['leased', 'leased']);
    for (const { msLeft } of await readRows(pool)) expect(msLeft).toBeGreaterThan(50_000);
  });

  test('is fresh again when its job is gone, by itself or with everything', async () => {
    const [first] = (await overdue(2)) as [OutboxEvent];
    await queues.remove(first.eventId);
    await reconcile();
    expect(await readStates(pool)).toEqual(['fresh', 'leased']);
    await redis.flushall();
    await pool.query(`UPDATE identity.outbox SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL`);
    await reconcile();
    expect(await readStates(pool)).toEqual(['fresh', 'fresh']);
  });

  test('has its dead letter finished when its job has failed; that may be tried again and again', async () => {
    const [event] = (await overdue(1)) as [OutboxEvent];
    await letFail('WRONGTYPE');
    const broken = reconcile({ deadLetter: () => Promise.reject(new Error('no database')) } as never);
    await expect(broken).rejects.toThrow('no database');
    expect(await readStates(pool)).toEqual(['leased']);
    await pool.query('UPDATE identity.outbox SET next_attempt_at = now()');
    dead.length = 0;
    await reconcile();
    expect(dead).toMatchObject([{ event, attempts: 1, reason: 'WRONGTYPE', failedAt: expect.any(Date) }]);
  });

  test('is looked at while it is locked: nobody can claim it or make its job meanwhile', async () => {
    await overdue(1);
    let judged = false;
    await reconcile({
      jobFate: async () => {
        const { rows } = await pool.query('SELECT FROM identity.outbox WHERE id = 1 FOR UPDATE SKIP LOCKED');
        judged = rows.length === 0;
        return 'missing';
      },
    } as never);
    expect(judged).toBe(true);
    expect(await readStates(pool)).toEqual(['fresh']);
  });

  test('stays as it is when Redis cannot be asked', async () => {
    await overdue(2);
    await expect(
      reconcile({ jobFate: () => Promise.reject(new Error('no Redis')) } as never),
    ).rejects.toThrow('no Redis');
    expect(await readStates(pool)).toEqual(['due', 'due']);
  });
});

test('all rows that are due are looked at in one round, by several pods at once as well', async () => {
  const events = await overdue(350);
  for (const event of events.slice(0, 150)) await queues.remove(event.eventId);
  await Promise.all([reconcile(), reconcile(), reconcile()]);
  const states = await readStates(pool);
  expect(states.filter((it) => it === 'fresh')).toHaveLength(150);
  expect(states.filter((it) => it === 'leased')).toHaveLength(200);
});
