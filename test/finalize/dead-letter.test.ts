import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { createClaim } from '../../src/claim/claim.ts';
import type { Aggregate } from '../../src/event.ts';
import { createDeadLetters } from '../../src/finalize/dead-letter.ts';
import type { LeasedEvent } from '../../src/outbox/outbox.ts';
import type { FailedJob } from '../../src/queue/queues.ts';
import { createLeaseReaper } from '../../src/recovery/lease-reaper.ts';
import { createTally } from '../../src/telemetry/tally.ts';
import { openContext, type TestContext } from '../support/context.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { readRows, readStates, readStream, silent } from '../support/stages.ts';

const BROKEN = 'identity.broken.v1';
const FAILED_AT = new Date('2026-01-02T03:04:05.678Z');
const WRITTEN_AT = /^\d+-\d+$/;

describe.each([
  ['with one Redis', false],
  ['where streams have a Redis of their own', true],
])('a dead letter, %s,', (_, twoServers) => {
  let stage: TestContext;
  let dlq: string;
  let event: LeasedEvent;

  beforeAll(async () => {
    stage = await openContext({ RELAY_MAX_RETRY_ATTEMPTS: '0' }, { twoServers });
    dlq = stage.config.dlqStreamName;
  });

  /** Three rows of one aggregate; the job of the first has failed, the others were parked behind it. */
  beforeEach(async () => {
    await stage.clear();
    await insertEvents(stage.pool, someEvents(3, 1));
    await stage.pool.query('UPDATE identity.outbox SET topic = $1 WHERE id = 1', [BROKEN]);
    [event] = (await stage.claim(1)) as [LeasedEvent];
    await stage.runJobs(() => Promise.reject(new Error('WRONGTYPE')));
    await stage.pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity' WHERE id > 1`);
  });

  type Deps = Parameters<typeof createDeadLetters>[0];

  /** Dead letters on the real servers; `written` are the events that were counted. */
  function createdWith(deps: Partial<Deps> = {}) {
    const written: string[] = [];
    const refills: Aggregate[] = [];
    const deadLetters = createDeadLetters({
      ...stage.context,
      metrics: { deadLettered: ({ eventId }) => void written.push(eventId) },
      refiller: { request: (aggregates) => void refills.push(...aggregates) },
      ...deps,
    });
    const failure = async (): Promise<FailedJob> => ({
      ...{ event, attempts: 6, reason: 'WRONGTYPE', failedAt: FAILED_AT },
      madeAt: await stage.madeAt(event.eventId),
    });
    return {
      ...{ written, refills },
      bury: async (overrides: Partial<FailedJob> = {}) =>
        deadLetters.bury({ ...(await failure()), ...overrides }),
      writeAgain: async () => deadLetters.writeAgain(await failure()),
    };
  }

  test('its line in the log comes after the collected ones of the attempts that failed', async () => {
    const lines: string[] = [];
    const logger = { ...silent, warn: (_: unknown, text: string) => void lines.push(text) };
    const tally = createTally({ ...silent, info: (_: unknown, text: string) => void lines.push(text) });
    tally.info(event.eventId, {}, 'publishing failed');
    await createdWith({ logger, tally }).bury();
    expect(lines).toEqual(['publishing failed', 'event moved to the dead-letter stream']);
  });

  test('that fails again after a Retry is told as that, not as another dead letter; one that is finished after a crash is not', async () => {
    const lines: unknown[] = [];
    const logger = { ...silent, warn: (fields: object, msg: string) => void lines.push({ ...fields, msg }) };
    const outbox = { ...stage.context.outbox, markDead: () => Promise.reject(new Error('the pod died')) };
    await expect(createdWith({ logger, outbox }).bury()).rejects.toThrow('the pod died');
    const { bury } = createdWith({ logger });
    await bury();
    const before = await readRows(stage.pool);
    // As the button does; nobody has mended the cause.
    await (await stage.context.queues.publish.getJob(event.eventId))?.retry();
    await stage.runJobs(() => Promise.reject(new Error('WRONGTYPE')));
    await bury({ attempts: 7, reason: 'still WRONGTYPE' });
    const [[dlqEntryId] = []] = await stage.streamRedis.xrange(dlq, '-', '+');
    const about = { eventId: event.eventId, topic: BROKEN, eventType: event.eventType, dlqEntryId };
    expect(lines).toEqual([
      { ...about, attempts: 6, reason: 'WRONGTYPE', msg: 'event moved to the dead-letter stream' },
      {
        ...{ ...about, attempts: 7, reason: 'still WRONGTYPE' },
        msg: 'a retried dead letter failed again; it stays dead',
      },
    ]);
    expect([await letters(), await readRows(stage.pool)]).toEqual([[expect.anything()], before]);
  });

  const letters = () => readStream(stage.streamRedis, dlq);
  const hasJob = async () => (await stage.redis.exists(stage.keyOf(event.eventId))) === 1;

  test('is one entry and a dead row, and then a refill of the aggregate is asked for', async () => {
    const { bury, refills } = createdWith();
    await bury();
    expect(await letters()).toMatchObject([
      {
        ...{ original_event_id: event.eventId, error_message: 'WRONGTYPE', attempts: '6', topic: BROKEN },
        failed_at: FAILED_AT.toISOString(),
      },
    ]);
    const [row] = await readRows(stage.pool);
    const [[entryId] = []] = await stage.streamRedis.xrange(dlq, '-', '+');
    expect(row).toMatchObject({
      ...{ state: 'dead', attempts: 6, errorMessage: 'WRONGTYPE', streamEntryId: entryId },
    });
    expect(await readStates(stage.pool)).toEqual(['dead', 'parked', 'parked']);
    expect(refills).toMatchObject([{ aggregateId: event.aggregateId }]);
  });

  test('written any number of times, at once or one after the other, is still one', async () => {
    const { bury, written } = createdWith();
    await Promise.all([bury(), bury(), bury()]);
    await bury();
    expect(await letters()).toHaveLength(1);
    expect(written).toEqual([event.eventId]);
    expect(await readStates(stage.pool)).toEqual(['dead', 'parked', 'parked']);
  });

  test('left half done after its entry, is finished by the next one that finds the job', async () => {
    const outbox = {
      ...stage.context.outbox,
      markDead: () => Promise.reject(new Error('the pod died')),
    };
    const { bury, written } = createdWith({ outbox });
    await expect(bury()).rejects.toThrow('the pod died');
    expect([await letters(), written, await hasJob()]).toMatchObject([[{}], [], true]);
    expect(await readStates(stage.pool)).toEqual(['leased', 'parked', 'parked']);
    await createdWith().bury();
    expect(await letters()).toHaveLength(1);
    expect(await readStates(stage.pool)).toEqual(['dead', 'parked', 'parked']);
  });

  if (!twoServers) {
    test('left half done, of a row that a person sets back, is not written again: the claim leaves the failed job to the lease reaper', async () => {
      const outbox = { ...stage.context.outbox, markDead: () => Promise.reject(new Error('it is locked')) };
      await expect(createdWith({ outbox }).bury()).rejects.toThrow('it is locked');
      await stage.pool.query('UPDATE identity.outbox SET attempts = 6, next_attempt_at = NULL WHERE id = 1');
      await createClaim({ ...stage.context, options: stage.config })();
      await createLeaseReaper(stage.context)();
      expect(await letters()).toHaveLength(1);
      expect(await readStates(stage.pool)).toEqual(['dead', 'parked', 'parked']);
      // Once the row names its dead letter, as after a replay in SQL, the event gets a new job.
      await stage.pool.query(
        'UPDATE identity.outbox SET attempts = 1, next_attempt_at = NULL, dead_lettered_at = NULL WHERE id = 1',
      );
      await createClaim({ ...stage.context, options: stage.config })();
      expect(await stage.context.queues.jobState(event.eventId)).toBe('waiting');
    });

    test('that was lost and written again does not keep its failed job from a replay in SQL', async () => {
      const { bury, writeAgain } = createdWith();
      await bury();
      await stage.streamRedis.xtrim(dlq, 'MAXLEN', 0);
      // As the recovery of lost data does.
      await stage.pool.query('UPDATE identity.outbox SET stream_entry_id = NULL WHERE id = 1');
      await writeAgain();
      await stage.pool.query(
        'UPDATE identity.outbox SET attempts = 1, next_attempt_at = NULL, dead_lettered_at = NULL WHERE id = 1',
      );
      await createClaim({ ...stage.context, options: stage.config })();
      expect(await stage.context.queues.jobState(event.eventId)).toBe('waiting');
    });
  }

  test('that Redis does not take leaves the row as it is, to be asked about again', async () => {
    const { bury, refills } = createdWith();
    await stage.streamRedis.set(dlq, 'a string');
    await bury();
    expect(await readStates(stage.pool)).toEqual(['leased', 'parked', 'parked']);
    await stage.streamRedis.del(dlq);
    await stage.streamRedis.config('SET', 'maxmemory', '1');
    try {
      await bury();
    } finally {
      await stage.streamRedis.config('SET', 'maxmemory', '0');
    }
    expect([await readStates(stage.pool), refills]).toEqual([['leased', 'parked', 'parked'], []]);
    await bury();
    expect(await readStates(stage.pool)).toEqual(['dead', 'parked', 'parked']);
  });

  test('of an epoch that ends before the commit changes no row', async () => {
    const { epoch } = stage.context;
    const ending = {
      async confirm(of: string) {
        await stage.streamRedis.set('bull:relay:epoch', 'checking:somebody');
        return epoch.confirm(of);
      },
    };
    await expect(createdWith({ epoch: ending }).bury()).rejects.toThrow('may have lost');
    expect(await readStates(stage.pool)).toEqual(['leased', 'parked', 'parked']);
    await stage.currentEpoch();
  });

  test('of a job that was removed meanwhile, or made again, is not written: the row will be tried again', async () => {
    const { bury } = createdWith();
    await bury({ madeAt: (await stage.madeAt(event.eventId)) - 1 });
    const madeAt = await stage.madeAt(event.eventId);
    await stage.context.queues.remove(event.eventId);
    await bury({ madeAt });
    expect(await stage.streamRedis.exists(dlq)).toBe(0);
    expect(await readStates(stage.pool)).toEqual(['leased', 'parked', 'parked']);
  });

  test('of a job that somebody started again meanwhile is not written', async () => {
    await (await stage.context.queues.publish.getJob(event.eventId))?.retry();
    await createdWith().bury();
    expect(await stage.streamRedis.exists(dlq)).toBe(0);
    expect(await readStates(stage.pool)).toEqual(['leased', 'parked', 'parked']);
  });

  test('of a job that remembers an entry is not written: the event is acknowledged, and its job removed', async () => {
    // As by an append that was answered too late: the job went on to fail.
    await (await stage.context.queues.publish.getJob(event.eventId))?.retry();
    const entryId = await stage.append(event);
    await stage.runJobs(() => Promise.reject(new Error('no answer')));
    const { bury, written } = createdWith();
    await bury();
    // The next one may be freed by now: the acknowledger asks for a refill.
    const [row] = await readRows(stage.pool);
    expect(row).toMatchObject({ state: 'published', streamEntryId: entryId });
    expect([await stage.streamRedis.exists(dlq), await hasJob(), written]).toEqual([0, false, []]);
    expect(await readStream(stage.streamRedis, BROKEN)).toHaveLength(1);
  });

  test.each(['NULL', 'now()'])(
    'of a row that is published by now (dead at: %s) does not change it',
    async (deadAt) => {
      await stage.pool.query(
        `UPDATE identity.outbox SET published = true, published_at = now(), next_attempt_at = NULL,
              dead_lettered_at = ${deadAt} WHERE id = 1`,
      );
      const before = await stage.pool.query('SELECT * FROM identity.outbox ORDER BY id');
      await createdWith().bury();
      const after = await stage.pool.query('SELECT * FROM identity.outbox ORDER BY id');
      expect(after.rows).toEqual(before.rows);
    },
  );

  test('that was lost is written again without a job, and its row knows it', async () => {
    await createdWith().bury();
    await stage.context.queues.remove(event.eventId);
    await stage.streamRedis.xtrim(dlq, 'MAXLEN', 0);
    await stage.pool.query('UPDATE identity.outbox SET stream_entry_id = NULL WHERE id = 1');
    const { writeAgain, written, refills } = createdWith();
    await writeAgain();
    expect(await letters()).toMatchObject([{ original_event_id: event.eventId, attempts: '6' }]);
    expect(await readRows(stage.pool)).toMatchObject([
      { state: 'dead', streamEntryId: expect.stringMatching(WRITTEN_AT) },
      { state: 'parked' },
      { state: 'parked' },
    ]);
    expect([written, refills]).toMatchObject([[event.eventId], [{ aggregateId: event.aggregateId }]]);
  });
});
