import { Worker } from 'bullmq';
import { beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { OutboxEvent } from '../../src/event.ts';
import { createQueues, publishQueueName } from '../../src/queue/queues.ts';
import type { Gate } from '../../src/streams/gate-script.ts';
import { MEMORY_TTL_S } from '../../src/streams/gate-script.ts';
import { aClaimedEvent, openRedis, readStream, silent } from '../support/stages.ts';
import {
  DLQ,
  ENTRY_ID,
  EPOCH_KEY,
  MADE_AT,
  openStreams,
  QUEUES,
  SIDES,
  type StreamStage,
  TOPIC,
} from '../support/streams.ts';

/** As Redis 7.0 and later versions say it. */
const NO_RIGHT = /NOPERM|can't access at least one of the keys/;
const FAILURE = { reason: 'WRONGTYPE', attempts: 6, failedAt: new Date('2026-01-02T03:04:05.678Z') };
const OTHER_TOPIC = 'dictionary.word.v1';
const GONE = { status: 'gone' };
const ASK_ROWS = { status: 'ask-rows' };
const EARLY = { status: 'early' };
const BEHIND = { status: 'behind', failedBefore: false };
const BEHIND_FAILED = { status: 'behind', failedBefore: true };

type Pair = [OutboxEvent, OutboxEvent];
type Three = [OutboxEvent, OutboxEvent, OutboxEvent];

describe.each(SIDES)('with %s', (side) => {
  let stage: StreamStage;

  beforeAll(async () => {
    stage = await openStreams(side);
  });

  beforeEach(async () => {
    await stage.clear();
  });

  const publish = (event: OutboxEvent, gate: Gate = 'open', madeAt = MADE_AT) =>
    stage.publish(event, gate, { madeAt });
  const deadLetter = (event: OutboxEvent, madeAt: number | null = MADE_AT) =>
    stage.streams.deadLetter({ event, ...FAILURE }, madeAt);
  /** Appended, and its entry. */
  async function appended(event: OutboxEvent, gate: Gate = 'open'): Promise<string> {
    const outcome = await publish(event, gate);
    if (outcome.status !== 'appended') throw new Error(`not appended: ${JSON.stringify(outcome)}`);
    return outcome.entryId;
  }
  const ids = (events: readonly OutboxEvent[]) => events.map((it) => it.eventId);

  describe('nothing is appended', () => {
    test('for a job that is gone, and nothing is left behind', async () => {
      const event = aClaimedEvent();
      for (const gate of ['ask', 'after', 'open', 'release'] as const)
        expect(await publish({ ...event, after: event.eventId }, gate)).toEqual(GONE);
      expect(await deadLetter(event)).toEqual(GONE);
      expect(await stage.redis.keys('*')).toEqual([EPOCH_KEY]);
    });

    test('for a job that is gone, though its event was appended before', async () => {
      const event = await stage.anEvent();
      await appended(event);
      await stage.removeJob(event);
      expect(await publish(event)).toEqual(GONE);
      expect(await stage.idsIn()).toEqual([event.eventId]);
    });

    test('by a run whose job was made anew meanwhile: the new one does it', async () => {
      const event = await stage.anEvent();
      await stage.removeJob(event);
      await stage.addJob(event, MADE_AT + 1);
      for (const gate of ['ask', 'open', 'release'] as const)
        expect(await publish(event, gate)).toEqual(GONE);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
      // Nor was the new job released.
      expect(await publish(event, 'open', MADE_AT + 1)).toMatchObject({ status: 'appended' });
    });

    test('by a run that comes late, after the job was given up', async () => {
      const event = await stage.anEvent();
      await stage.giveUp(event);
      expect(await publish(event)).toEqual(GONE);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
    });

    test('before the rows were asked, where they are to be', async () => {
      const event = await stage.anEvent();
      expect(await publish(event, 'ask')).toEqual(ASK_ROWS);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
      expect(await publish(event, 'open')).toMatchObject({ status: 'appended' });
    });
  });

  describe('an entry that is remembered', () => {
    const stays = (event: OutboxEvent, entryId: string) => ({
      ...{ status: 'remembered', entryId, epoch: stage.epoch.name },
      memory: `${stage.epochId()} ${entryId}`,
      entries: [event.eventId],
    });
    const asked = async (event: OutboxEvent, gate: Gate = 'open') => ({
      ...(await publish(event, gate)),
      memory: await stage.memoryOf(event),
      entries: await stage.idsIn(),
    });

    test.each(['ask', 'after', 'release'] as const)(
      'is the answer before the gate is looked at: %s',
      async (gate) => {
        const event = await stage.anEvent();
        const entryId = await appended(event);
        expect(await asked({ ...event, after: aClaimedEvent().eventId }, gate)).toEqual(
          stays(event, entryId),
        );
      },
    );

    test('is the answer for the job that is made in the place of its own as well', async () => {
      const event = await stage.anEvent();
      const entryId = await appended(event);
      await stage.removeJob(event);
      await stage.addJob(event, MADE_AT + 1);
      const answer = { status: 'remembered', entryId };
      expect(await publish(event, 'open', MADE_AT + 1)).toMatchObject(answer);
      // In an earlier epoch too, as long as it is there.
      await stage.beginEpoch();
      expect(await publish(event, 'open', MADE_AT + 1)).toMatchObject(answer);
      expect(await stage.idsIn()).toEqual([event.eventId]);
    });

    test('in this epoch is the answer, though it is trimmed by now', async () => {
      const event = await stage.anEvent();
      const entryId = await appended(event);
      await stage.redis.xtrim(TOPIC, 'MAXLEN', 0);
      expect(await asked(event)).toEqual({ ...stays(event, entryId), entries: [] });
    });

    test('in an earlier epoch is the answer if it is in the stream, and is remembered in this one', async () => {
      const event = await stage.anEvent();
      const entryId = await appended(event);
      await stage.beginEpoch();
      expect(await asked(event, 'ask')).toEqual(stays(event, entryId));
      // In this epoch it is known to be there.
      await stage.redis.xdel(TOPIC, entryId);
      expect(await asked(event)).toMatchObject({ status: 'remembered', entryId });
    });

    test('by a build that knew no epochs is the answer if it is in the stream', async () => {
      const event = await stage.anEvent();
      const entryId = await appended(event);
      await stage.remember(event, entryId);
      expect(await asked(event, 'ask')).toEqual(stays(event, entryId));
    });

    test.each([
      ['in an earlier epoch', (id: string) => `earlier ${id}`],
      ['by a build that knew no epochs', (id: string) => id],
    ])('%s is none if it is not in the stream, or is another event’s', async (_, memory) => {
      const event = await stage.anEvent();
      for (const fields of [
        null,
        ['event_id', aClaimedEvent().eventId],
        ['original_event_id', event.eventId],
      ]) {
        // As after a comparison: the stream is not lost.
        await stage.redis.del(TOPIC, `${EPOCH_KEY}:last-entries`);
        if (fields !== null) await stage.redis.xadd(TOPIC, '5-1', ...fields);
        await stage.remember(event, memory('5-1'));
        expect(await publish(event, 'ask')).toEqual(ASK_ROWS);
        const outcome = await publish(event);
        expect(outcome).toMatchObject({ status: 'appended', entryId: expect.not.stringMatching(/^5-1$/) });
        expect(await publish(event)).toEqual({ ...outcome, status: 'remembered' });
      }
    });

    test('that is no stream id never passes for one', async () => {
      const event = await stage.anEvent();
      for (const junk of [
        'OK',
        '1',
        '-1',
        '1700000000000',
        '1-2-3',
        ' ',
        '-',
        '+',
        '99999999999999999999-1',
        'x y',
      ]) {
        await stage.remember(event, junk);
        expect(await publish(event, 'ask')).toEqual(ASK_ROWS);
        await stage.remember(event, `${stage.epochId()} ${junk}`);
        if (!ENTRY_ID.test(junk)) expect(await publish(event, 'ask')).toEqual(ASK_ROWS);
      }
      expect(await publish(event)).toMatchObject({ status: 'appended' });
      expect(await stage.idsIn()).toEqual([event.eventId]);
    });
  });

  describe('a job that is released', () => {
    test('is never appended, by no run of it', async () => {
      const event = await stage.anEvent();
      expect(await publish(event, 'release')).toEqual(BEHIND);
      const other = await stage.pod();
      for (const through of [stage.streams, other])
        for (const gate of ['open', 'after', 'ask', 'release'] as const)
          expect(await stage.publish(event, gate, { through })).toEqual(BEHIND);
      await stage.beginEpoch();
      expect(await publish(event)).toEqual(BEHIND);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
    });

    test('releases none that is made after it', async () => {
      const event = await stage.anEvent();
      await publish(event, 'release');
      await stage.removeJob(event);
      await stage.addJob(event, MADE_AT + 1);
      expect(await publish(event)).toEqual(GONE);
      expect(await publish(event, 'open', MADE_AT + 1)).toMatchObject({ status: 'appended' });
    });
  });

  describe('an event behind another one', () => {
    test('is early until that one is appended, by whichever pod', async () => {
      const [first, second] = (await stage.aggregate(2)) as Pair;
      expect(await publish(second, 'after')).toEqual(EARLY);
      expect(await publish(second, 'after')).toEqual(EARLY);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
      await stage.publish(first, 'open', { through: await stage.pod() });
      const outcome = await publish(second, 'after');
      expect(['appended', 'remembered']).toContain(outcome.status);
      expect(await stage.idsIn()).toEqual(ids([first, second]));
    });

    test('passes with it, in one call', async () => {
      const [first, second, third] = (await stage.aggregate(3)) as Three;
      const outcomes = await Promise.all([
        ...[publish(third, 'after'), publish(second, 'after'), publish(first)],
      ]);
      expect(outcomes.map((it) => it.status)).toEqual(['appended', 'appended', 'appended']);
      expect(await stage.idsIn()).toEqual(ids([first, second, third]));
    });

    test('is released when that one has failed before, whatever comes of it later', async () => {
      const [first, second] = (await stage.aggregate(2)) as Pair;
      await stage.fail(first);
      expect(await publish(second, 'after')).toEqual(BEHIND_FAILED);
      await appended(first);
      expect(await publish(second, 'after')).toEqual(BEHIND);
      expect(await publish(second)).toEqual(BEHIND);
      expect(await stage.idsIn()).toEqual([first.eventId]);
    });

    test('is released when that one is, and so on; not when it was appended before it could be', async () => {
      const [first, second, third] = (await stage.aggregate(3)) as Three;
      await publish(first, 'release');
      expect(await publish(second, 'after')).toEqual(BEHIND);
      expect(await publish(third, 'after')).toEqual(BEHIND);
      for (const event of [second, third]) expect(await publish(event)).toEqual(BEHIND);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
      const [one, other] = (await stage.aggregate(2)) as Pair;
      await appended(one);
      expect(await publish(one, 'release')).toMatchObject({ status: 'remembered' });
      expect(await publish(other, 'after')).toMatchObject({ status: 'appended' });
    });

    test('is early when that one was released, and has a new job', async () => {
      const [first, second] = (await stage.aggregate(2)) as Pair;
      await publish(first, 'release');
      await stage.removeJob(first);
      await stage.addJob(first, MADE_AT + 1);
      expect(await publish(second, 'after')).toEqual(EARLY);
    });

    test('passes when that one has failed, and was appended by its retry', async () => {
      const [first, second] = (await stage.aggregate(2)) as Pair;
      await stage.fail(first);
      await appended(first);
      expect(await publish(second, 'after')).toMatchObject({ status: 'appended' });
    });

    test('asks the rows when that one is gone, or has failed for good', async () => {
      const [first, second, third] = (await stage.aggregate(3)) as Three;
      await stage.removeJob(first);
      expect(await publish(second, 'after')).toEqual(ASK_ROWS);
      await stage.giveUp(second);
      expect(await publish(third, 'after')).toEqual(ASK_ROWS);
      expect(await stage.redis.exists(TOPIC)).toBe(0);
      // The rows have said that nothing comes before it.
      expect(await publish(third)).toMatchObject({ status: 'appended' });
    });

    test('waits for that one, where it was appended in an earlier epoch only', async () => {
      const [first, second, third] = (await stage.aggregate(3)) as Three;
      await appended(first);
      await stage.beginEpoch();
      expect(await publish(second, 'after')).toEqual(EARLY);
      // A name that only begins like it.
      await stage.remember(first, `${stage.epochId()}x 5-1`);
      expect(await publish(second, 'after')).toEqual(EARLY);
      await stage.removeJob(first);
      expect(await publish(second, 'after')).toEqual(ASK_ROWS);
      await publish(second);
      expect(await publish(third, 'after')).toMatchObject({ status: 'appended' });
    });
  });

  describe('a stream of this epoch', () => {
    const LOST = { status: 'unavailable' };

    test.each([
      ['was deleted', async () => void (await stage.redis.del(TOPIC))],
      [
        'was deleted and made again by a consumer',
        async () => {
          await stage.redis.del(TOPIC);
          await stage.redis.xgroup('CREATE', TOPIC, 'group', '$', 'MKSTREAM');
        },
      ],
      [
        'was deleted, and another one was written and emptied',
        async () => {
          await stage.redis.del(TOPIC);
          await stage.redis.xadd(TOPIC, '1-1', 'n', '1');
          await stage.redis.xtrim(TOPIC, 'MAXLEN', 0);
        },
      ],
    ])('that %s is not begun anew, and the epoch ends for all pods', async (_, lose) => {
      await appended(await stage.anEvent());
      await appended(await stage.anEvent({ topic: OTHER_TOPIC }));
      await lose();
      const event = await stage.anEvent();
      const through = await stage.pod();
      expect(await stage.publish(event, 'open', { through })).toMatchObject(LOST);
      expect(await publish(event)).toMatchObject(LOST);
      expect(stage.epoch.ended).toEqual([stage.epoch.name, stage.epoch.name]);
      expect(await stage.idsIn()).toEqual([]);
      // In the next epoch it is known to be gone.
      await stage.beginEpoch();
      expect(await publish(event)).toMatchObject({ status: 'appended' });
    });

    test('that is lost keeps none back whose stream is there, in the same call', async () => {
      await appended(await stage.anEvent());
      await stage.redis.del(TOPIC);
      const [lost, other] = [await stage.anEvent(), await stage.anEvent({ topic: OTHER_TOPIC })];
      expect(await Promise.all([publish(lost), publish(other)])).toMatchObject([
        LOST,
        { status: 'appended' },
      ]);
    });

    test.each([
      ['trimmed to nothing', () => stage.redis.xtrim(TOPIC, 'MAXLEN', 0)],
      [
        'emptied entry by entry',
        async () => {
          for (const [id] of await stage.redis.xrange(TOPIC, '-', '+')) await stage.redis.xdel(TOPIC, id);
        },
      ],
    ])('that was %s is not lost', async (_, empty) => {
      for (let i = 0; i < 3; i++) await appended(await stage.anEvent());
      await empty();
      expect(await stage.redis.xlen(TOPIC)).toBe(0);
      expect(await publish(await stage.anEvent())).toMatchObject({ status: 'appended' });
      expect(stage.epoch.ended).toEqual([]);
    });

    test('that holds no stream any more is refused, not lost', async () => {
      await appended(await stage.anEvent());
      await stage.redis.set(TOPIC, 'a string');
      expect(await publish(await stage.anEvent())).toMatchObject({ status: 'refused' });
      expect(stage.epoch.ended).toEqual([]);
    });

    test('is found lost by a dead letter, too', async () => {
      const [first, second] = (await stage.aggregate(2)) as Pair;
      await stage.giveUp(first);
      await stage.giveUp(second);
      await deadLetter(first);
      await stage.redis.del(DLQ);
      expect(await deadLetter(second)).toMatchObject(LOST);
      expect(stage.epoch.ended).toEqual([stage.epoch.name]);
      expect(await stage.redis.exists(DLQ)).toBe(0);
    });
  });

  describe('a dead letter', () => {
    test('has the old fields, the rest of the envelope, and why and when', async () => {
      const event = await stage.anEvent({ tenantId: 'tenant', correlationId: 'correlation' });
      await stage.giveUp(event);
      expect(await deadLetter(event)).toMatchObject({ status: 'appended', epoch: stage.epoch.name });
      expect(await readStream(stage.redis, DLQ)).toEqual([
        {
          ...{ original_event_id: event.eventId, event_type: 'UserCreated', aggregate_id: event.aggregateId },
          ...{ payload: event.payload, error_message: 'WRONGTYPE', attempts: '6' },
          ...{ failed_at: '2026-01-02T03:04:05.678Z', created_at: event.occurredAt },
          ...{ event_id: event.eventId, topic: TOPIC, tenant_id: 'tenant', aggregate_type: 'user' },
          ...{ schema_version: '1', occurred_at: event.occurredAt, correlation_id: 'correlation' },
        },
      ]);
    });

    test('is written once for each job', async () => {
      const event = await stage.anEvent();
      await stage.giveUp(event);
      const letter = await deadLetter(event);
      expect(letter).toMatchObject({ status: 'appended', entryId: expect.stringMatching(ENTRY_ID) });
      expect(await deadLetter(event)).toEqual({ ...letter, status: 'remembered' });
      await stage.beginEpoch();
      expect(await deadLetter(event)).toMatchObject({
        ...letter,
        status: 'remembered',
        epoch: stage.epoch.name,
      });
      expect(await stage.redis.xlen(DLQ)).toBe(1);
      // The event was replayed, and dies again.
      await stage.removeJob(event);
      await stage.addJob(event, MADE_AT + 1);
      expect(await deadLetter(event)).toEqual(GONE);
      expect(await deadLetter(event, MADE_AT + 1)).toEqual(GONE);
      await stage.giveUp(event);
      expect(await deadLetter(event)).toEqual(GONE);
      expect(await deadLetter(event, MADE_AT + 1)).toMatchObject({ status: 'appended' });
      expect(await stage.redis.xlen(DLQ)).toBe(2);
    });

    test('is not written of a job that remembers its entry: the event is published', async () => {
      const event = await stage.anEvent();
      const entryId = await appended(event);
      await stage.giveUp(event);
      const published = () => ({ status: 'published', entryId, epoch: stage.epoch.name });
      expect(await deadLetter(event)).toEqual(published());
      await stage.beginEpoch();
      expect(await deadLetter(event)).toEqual(published());
      await stage.remember(event, entryId);
      expect(await deadLetter(event)).toEqual(published());
      expect(await stage.redis.exists(DLQ)).toBe(0);
      // Of an entry that is lost it is written.
      await stage.redis.xdel(TOPIC, entryId);
      expect(await deadLetter(event)).toMatchObject({ status: 'appended' });
    });

    test('is taken away when its event is appended after all', async () => {
      const event = await stage.anEvent();
      await stage.giveUp(event);
      await deadLetter(event);
      // Too early: it is dead still, with the same dead letter.
      expect(await publish(event)).toEqual(GONE);
      expect(await stage.redis.xlen(DLQ)).toBe(1);
      await stage.retry(event);
      expect(await publish(event)).toMatchObject({ status: 'appended' });
      expect([await stage.redis.xlen(TOPIC), await stage.redis.xlen(DLQ)]).toEqual([1, 0]);
      expect(await stage.jobs.hget(stage.memoryKey(event.eventId), 'relay:dlq')).toBeNull();
      expect(await stage.redis.keys('bull:relay:dead:*')).toEqual([]);
      // It is that of this event no more.
      await stage.redis.xadd(DLQ, '*', 'event_id', event.eventId);
      expect(await publish(event)).toMatchObject({ status: 'remembered' });
      expect(await stage.redis.xlen(DLQ)).toBe(1);
    });

    test('stays while its event is not appended', async () => {
      const [first, event] = (await stage.aggregate(2)) as Pair;
      await stage.giveUp(event);
      await deadLetter(event);
      await stage.retry(event);
      expect(await publish(event, 'ask')).toEqual(ASK_ROWS);
      expect(await publish(event, 'after')).toEqual(EARLY);
      await stage.redis.set(TOPIC, 'a string');
      expect(await publish(event)).toMatchObject({ status: 'refused' });
      await stage.fail(first);
      expect(await publish(event, 'after')).toEqual(BEHIND_FAILED);
      expect(await stage.redis.xlen(DLQ)).toBe(1);
      // It fails once more.
      await stage.giveUp(event);
      expect(await deadLetter(event)).toMatchObject({ status: 'remembered' });
    });

    test('that is lost is written again, of a job and without one', async () => {
      const [event, jobless] = (await stage.aggregate(2)) as Pair;
      await stage.giveUp(event);
      await deadLetter(event);
      await stage.redis.del(DLQ);
      await stage.beginEpoch();
      expect(await deadLetter(event)).toMatchObject({ status: 'appended' });
      await stage.removeJob(jobless);
      expect(await deadLetter(jobless)).toEqual(GONE);
      expect(await deadLetter(jobless, null)).toMatchObject({ status: 'appended' });
      expect(await stage.idsIn(DLQ)).toEqual(ids([event, jobless]));
      // Nothing is made for a job that is not there.
      expect(await stage.jobs.exists(stage.memoryKey(jobless.eventId))).toBe(0);
      expect(await stage.redis.keys('*:dead:*null*')).toEqual([]);
    });

    test('is written of an event whose stream the relay may not touch', async () => {
      const event = await stage.anEvent({ topic: 'forbidden' });
      const limited = await stage.pod({ url: await stage.limitedUrl() });
      expect(await stage.publish(event, 'open', { through: limited })).toMatchObject({ status: 'refused' });
      await stage.giveUp(event);
      expect(await limited.deadLetter({ event, ...FAILURE }, MADE_AT)).toMatchObject({ status: 'appended' });
      expect(await stage.idsIn(DLQ)).toEqual([event.eventId]);
    });

    test('is not written, nor is the event appended again, while Redis refuses to tell whether its entry is there', async () => {
      const event = await stage.anEvent({ topic: 'forbidden' });
      const { entryId } = (await stage.publish(event)) as { entryId: string };
      await stage.beginEpoch();
      const limited = await stage.pod({ url: await stage.limitedUrl() });
      const refused = { status: 'refused', reason: expect.stringMatching(NO_RIGHT) };
      expect(await stage.publish(event, 'open', { through: limited })).toEqual(refused);
      await stage.giveUp(event);
      expect(await limited.deadLetter({ event, ...FAILURE }, MADE_AT)).toEqual(refused);
      expect(await deadLetter(event)).toMatchObject({ status: 'published', entryId });
      expect([await stage.idsIn('forbidden'), await stage.idsIn(DLQ)]).toEqual([[event.eventId], []]);
    });

    test('is written, though the job remembers an entry, where no stream has it any more', async () => {
      const [event, other] = [await stage.anEvent(), await stage.anEvent()];
      await stage.remember(event, '5-1');
      await stage.remember(other, 'no id');
      await stage.redis.set(TOPIC, 'a string');
      for (const one of [event, other]) {
        await stage.giveUp(one);
        expect(await deadLetter(one)).toMatchObject({ status: 'appended' });
      }
    });

    test('that Redis refuses says why, and is written when the reason is gone', async () => {
      const event = await stage.anEvent();
      await stage.giveUp(event);
      await stage.redis.set(DLQ, 'a string');
      const refused = { status: 'refused', reason: expect.stringMatching(/^WRONGTYPE/) };
      expect(await deadLetter(event)).toEqual(refused);
      expect(await deadLetter(event, null)).toEqual(refused);
      await stage.redis.del(DLQ);
      expect(await deadLetter(event)).toMatchObject({ status: 'appended' });
    });
  });

  test('jobs are read as BullMQ writes them', async () => {
    const redis = openRedis(stage.queueServer.url);
    const queues = createQueues(redis, QUEUES, silent);
    const worker = new Worker(publishQueueName(QUEUES.queueName), undefined, {
      connection: openRedis(stage.queueServer.url, { maxRetriesPerRequest: null }),
      prefix: QUEUES.queuePrefix,
      autorun: false,
    });
    try {
      // One that may be tried again, and one that may not.
      const failing = aClaimedEvent({ id: '1' });
      const dying = aClaimedEvent({ id: '2', attempts: QUEUES.maxRetryAttempts });
      await queues.addPublishJobs([failing, dying]);
      const jobs = new Map<string, { madeAt: number; retry: () => Promise<void> }>();
      const behind = (event: OutboxEvent) => stage.anEvent({ id: '9', after: event.eventId });
      for (const _ of [failing, dying]) {
        const job = await worker.getNextJob('token');
        if (!job?.id) throw new Error('no job');
        jobs.set(job.id, { madeAt: job.timestamp, retry: () => job.retry() });
        // Nobody has failed yet.
        expect(await publish(await behind(job.data), 'after')).toEqual(EARLY);
        await job.moveToFailed(new Error('x'), 'token', false);
      }
      expect(await publish(await behind(failing), 'after')).toEqual(BEHIND_FAILED);
      expect(await publish(await behind(dying), 'after')).toEqual(ASK_ROWS);
      const { madeAt, retry } = jobs.get(dying.eventId) as { madeAt: number; retry: () => Promise<void> };
      expect(await publish(dying, 'open', madeAt)).toEqual(GONE);
      expect(await deadLetter(dying, madeAt)).toMatchObject({ status: 'appended' });
      await retry();
      expect(await publish(dying, 'open', madeAt)).toMatchObject({ status: 'appended' });
      expect(await stage.redis.xlen(DLQ)).toBe(0);
      expect(await publish(failing, 'open', jobs.get(failing.eventId)?.madeAt)).toMatchObject({
        status: 'appended',
      });
    } finally {
      await worker.close();
      await queues.close();
    }
  });
});

describe.each(SIDES)('the cascade, with %s', (side) => {
  let stage: StreamStage;
  const hasTwoServers = side === 'two servers';
  const ENDED: [string, (event: OutboxEvent) => Promise<unknown>][] = [
    ['has ended', (event) => stage.giveUp(event)],
    ['is gone', (event) => stage.removeJob(event)],
    [
      'was made anew',
      async (event) => {
        await stage.removeJob(event);
        await stage.addJob(event, MADE_AT + 1);
      },
    ],
  ];

  beforeAll(async () => {
    stage = await openStreams(side);
  });

  beforeEach(async () => {
    await stage.clear();
  });

  const ids = (events: readonly OutboxEvent[]) => events.map((it) => it.eventId);
  /** They are early, on another pod. */
  async function keep(events: readonly OutboxEvent[]): Promise<void> {
    const other = await stage.pod();
    for (const event of events)
      expect(await stage.publish(event, 'after', { through: other })).toEqual(EARLY);
  }
  const isKnown = (event: OutboxEvent) => stage.streams.isAppended(event.eventId, stage.epoch.name as string);

  test('appends what has waited with what it waited for, whole, in order', async () => {
    const [first, ...rest] = (await stage.aggregate(4, { correlationId: 'correlation' })) as Three;
    const other = await stage.pod();
    // In whichever order they came.
    for (const event of [...rest].reverse())
      expect(await stage.publish(event, 'after', { through: other })).toEqual(EARLY);
    const woken = stage.streams.untilAppended([rest[1]?.eventId as string], 60_000);
    expect(await stage.publish(first)).toMatchObject({ status: 'appended' });
    await woken;
    expect(await stage.idsIn()).toEqual(ids([first, ...rest]));
    const entries = await readStream(stage.redis, TOPIC);
    expect(entries.map((it) => [it.payload, it.correlation_id])).toEqual(
      [first, ...rest].map((it) => [it.payload, 'correlation']),
    );
    // This pod knows; others are told when they ask, and nothing is written for it.
    expect(rest.map(isKnown)).toEqual([true, true, true]);
    expect(other.isAppended(rest[0].eventId, stage.epoch.name as string)).toBe(false);
    for (const event of rest)
      expect(await stage.publish(event, 'after', { through: other })).toMatchObject({ status: 'remembered' });
    expect(await stage.redis.xlen(TOPIC)).toBe(4);
  });

  test('goes into the streams of other topics, and trims as those who wait would', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    const other = await stage.pod({ streamMaxLen: 1 });
    for (let i = 0; i < 150; i++) await stage.redis.xadd(OTHER_TOPIC, '*', 'event_id', 'x');
    const elsewhere = { ...second, topic: OTHER_TOPIC };
    expect(await stage.publish(elsewhere, 'after', { through: other })).toEqual(EARLY);
    await stage.publish(first);
    expect((await stage.idsIn(OTHER_TOPIC)).at(-1)).toBe(second.eventId);
    expect(await stage.redis.xlen(OTHER_TOPIC)).toBeLessThan(150);
  });

  test('appends so many in one call at most; those that are left go on by themselves', async () => {
    const events = await stage.aggregate(80);
    await keep(events.slice(1));
    await stage.publish(events[0] as OutboxEvent);
    expect(await stage.idsIn()).toEqual(ids(events.slice(0, 65)));
    expect(await stage.publish(events[65] as OutboxEvent, 'after')).toMatchObject({ status: 'appended' });
    expect(await stage.idsIn()).toEqual(ids(events));
  });

  test('appends so many in one call at most, of all aggregates together', async () => {
    const heads: OutboxEvent[] = [];
    for (let i = 0; i < 4; i++) {
      const [head, ...rest] = (await stage.aggregate(31)) as Pair;
      heads.push(head);
      await keep(rest);
    }
    await Promise.all(heads.map((event) => stage.publish(event)));
    expect(await stage.redis.xlen(TOPIC)).toBe(4 + 64);
  });

  test('begins with what was remembered of the entry, though its job is gone', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await stage.publish(first);
    await stage.removeJob(first);
    expect(await stage.publish(second, 'after')).toMatchObject({ status: 'appended' });
    expect(await stage.idsIn()).toEqual(ids([first, second]));
  });

  test('does not go from one epoch to the next', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await keep([second]);
    await stage.beginEpoch();
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual([first.eventId]);
    // Early again in this one, it is kept again.
    const [third, fourth] = (await stage.aggregate(2)) as Pair;
    await keep([fourth]);
    await stage.beginEpoch();
    await keep([fourth]);
    await stage.publish(third);
    expect(await stage.idsIn()).toEqual(ids([first, third, fourth]));
  });

  test.each<[string, (event: OutboxEvent) => Promise<unknown>]>([
    ['was released', (event) => stage.publish(event, 'release')],
    [
      'remembers an entry of an earlier epoch, which only it may judge',
      (event) => stage.remember(event, 'x 5-1'),
    ],
    // Of another server's jobs it knows what they have left beside the stream.
    ...(hasTwoServers ? [] : ENDED),
  ])('ends before a job that %s', async (_, change) => {
    const [first, second, third] = (await stage.aggregate(3)) as Three;
    await keep([second, third]);
    await change(second);
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual([first.eventId]);
    expect([isKnown(second), isKnown(third)]).toEqual([false, false]);
  });

  test('appends nobody twice', async () => {
    const [first, second, third] = (await stage.aggregate(3)) as Three;
    await keep([second, third]);
    // The rows have let it pass meanwhile.
    await stage.publish(second);
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual(ids([second, third, first]));
  });

  test('keeps a job that was made anew in the place of the old one', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await keep([second]);
    await stage.removeJob(second);
    await stage.addJob(second, MADE_AT + 1);
    expect(await stage.publish(second, 'after', { madeAt: MADE_AT + 1 })).toEqual(EARLY);
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual(ids([first, second]));
  });

  test('ends with a refusal, and leaves the refused one to fail by itself', async () => {
    const [first, second, third] = (await stage.aggregate(3)) as Three;
    const refused = { ...second, topic: OTHER_TOPIC };
    await stage.redis.set(OTHER_TOPIC, 'a string');
    await keep([refused, third]);
    expect(await stage.publish(first)).toMatchObject({ status: 'appended' });
    expect(await stage.idsIn()).toEqual([first.eventId]);
    expect(await stage.publish(refused, 'after')).toMatchObject({
      ...{ status: 'refused', reason: expect.stringMatching(/^WRONGTYPE/) },
    });
    expect(await stage.publish(third, 'after')).toEqual(EARLY);
  });

  test('ends before a stream that is lost', async () => {
    await stage.publish(await stage.anEvent({ topic: OTHER_TOPIC }));
    const [first, second] = (await stage.aggregate(2)) as Pair;
    const elsewhere = { ...second, topic: OTHER_TOPIC };
    await keep([elsewhere]);
    await stage.redis.del(OTHER_TOPIC);
    await stage.publish(first);
    expect([await stage.idsIn(), await stage.idsIn(OTHER_TOPIC)]).toEqual([[first.eventId], []]);
    expect(await stage.publish(elsewhere, 'after')).toMatchObject({ status: 'unavailable' });
    expect(stage.epoch.ended).toEqual([stage.epoch.name]);
  });

  test('notes its streams: one that is lost is missed', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await keep([{ ...second, topic: OTHER_TOPIC }]);
    await stage.publish(first);
    expect(await stage.idsIn(OTHER_TOPIC)).toEqual([second.eventId]);
    await stage.redis.del(OTHER_TOPIC);
    expect(await stage.publish(await stage.anEvent({ topic: OTHER_TOPIC }))).toMatchObject({
      status: 'unavailable',
    });
  });

  test('leaves a job that has a dead letter to take it away by itself', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await keep([second]);
    await stage.giveUp(second);
    await stage.streams.deadLetter({ event: second, ...FAILURE }, MADE_AT);
    await stage.retry(second);
    await stage.publish(first);
    await stage.publish(second, 'after');
    expect(await stage.idsIn()).toEqual(ids([first, second]));
    expect(await stage.redis.xlen(DLQ)).toBe(0);
  });
});

describe('where the jobs are on another server', () => {
  let stage: StreamStage;

  beforeAll(async () => {
    stage = await openStreams('two servers');
  });

  beforeEach(async () => {
    await stage.clear();
  });

  test('an early entry is kept for a minute, and whoever still waits then keeps it again', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    const key = `${stage.memoryKey(first.eventId)}:next`;
    for (let i = 0; i < 2; i++) {
      expect(await stage.publish(second, 'after')).toEqual(EARLY);
      const ttl = await stage.redis.ttl(key);
      expect(ttl).toBeGreaterThan(0);
      expect(ttl).toBeLessThanOrEqual(60);
      await stage.redis.del(key);
    }
    // Without it, who waits asks again.
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual([first.eventId]);
    expect(await stage.publish(second, 'after')).toMatchObject({ status: 'appended' });
  });

  test('an event whose dead letter is written is not appended with the one before it', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    expect(await stage.publish(second, 'after')).toEqual(EARLY);
    await stage.giveUp(second);
    await stage.streams.deadLetter({ event: second, ...FAILURE }, MADE_AT);
    await stage.publish(first);
    expect(await stage.idsIn()).toEqual([first.eventId]);
  });

  test('an early event whose job is gone is appended with the one before it: its next job learns that', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    expect(await stage.publish(second, 'after')).toEqual(EARLY);
    await stage.removeJob(second);
    await stage.publish(first);
    await stage.addJob(second, MADE_AT + 1);
    expect(await stage.publish(second, 'ask', { madeAt: MADE_AT + 1 })).toMatchObject({
      status: 'remembered',
    });
    expect(await stage.idsIn()).toEqual([first.eventId, second.eventId]);
  });

  test('an entry is appended once, whichever job of the event asks', async () => {
    const event = await stage.anEvent();
    const first = await stage.publish(event);
    await stage.addJob(event, MADE_AT + 1);
    const again = await stage.publish(event, 'open', { madeAt: MADE_AT + 1 });
    expect(again).toEqual({ ...first, status: 'remembered' });
    expect(await stage.idsIn()).toEqual([event.eventId]);
  });

  test('who waits passes though the job before is gone: its entry is remembered without it', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await stage.publish(first);
    await stage.removeJob(first);
    expect(await stage.publish(second, 'after')).toMatchObject({ status: 'appended' });
  });

  test('the memory lasts for an hour from the last time that somebody asked', async () => {
    const [first, second] = (await stage.aggregate(2)) as Pair;
    await stage.publish(first);
    const key = stage.memoryKey(first.eventId);
    const left = async () => MEMORY_TTL_S - (await stage.redis.ttl(key));
    expect(await left()).toBeLessThan(60);
    // Its own job asks, and the one behind it.
    for (const ask of [() => stage.publish(first), () => stage.publish(second, 'after')]) {
      await stage.redis.expire(key, 100);
      await ask();
      expect(await left()).toBeLessThan(60);
    }
    const dead = await stage.anEvent();
    await stage.giveUp(dead);
    await stage.streams.deadLetter({ event: dead, ...FAILURE }, MADE_AT);
    const released = await stage.anEvent();
    await stage.publish(released, 'release');
    for (const it of await stage.redis.keys('bull:relay:[ed]*:*')) {
      if (it.startsWith(EPOCH_KEY)) continue;
      expect(await stage.redis.ttl(it), it).toBeGreaterThan(0);
    }
  });
});
