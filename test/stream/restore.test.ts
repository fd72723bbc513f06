import { beforeEach, describe, expect, test } from 'vitest';
import { createRestorer, NotOurEpochError } from '../../src/stream/restore.ts';
import { createRedis } from '../support/servers.ts';
import { aClaimedEvent, openAdminRedis, openRedis, readStream } from '../support/stages.ts';

const TOPIC = 'identity.user.v1';
const DLQ = 'identity.user.v1.dlq';
const EPOCH_KEY = 'bull:relay:epoch';
const GUARD = 'checking:me';
const jobKey = (eventId: string) => `bull:relay-publish:${eventId}`;

const server = await createRedis();
const redis = openAdminRedis(server.adminUrl);
const restorer = createRestorer(openRedis(server.url), {
  ...{ dlqStreamName: DLQ, streamMaxLen: 0, dlqMaxLen: 0, queueKeyPrefix: 'bull:' },
  ...{ jobKey, epochKey: EPOCH_KEY },
});

beforeEach(async () => {
  await redis.flushall();
  await redis.set(EPOCH_KEY, GUARD);
});

const add = async (...ids: string[]) => {
  for (const id of ids) await redis.xadd(TOPIC, id, 'event_id', 'x');
};

describe('of the entries that a stream should have', () => {
  test('those are lost that are not there, and those trimmed that are older than its first', async () => {
    await add('5-1', '5-3', '9-0');
    expect(
      await restorer.absent(TOPIC, ['3-7', '5-0', '5-1', '5-2', '5-3', '9-0', '9-1', '10-0'], false),
    ).toEqual({
      lost: ['5-2', '9-1', '10-0'],
      trimmed: 2,
      unreadable: false,
    });
  });

  test('all are lost when it is gone', async () => {
    expect(await restorer.absent(TOPIC, ['1-0', '2-0'], false)).toMatchObject({
      lost: ['1-0', '2-0'],
      trimmed: 0,
    });
  });

  test('none are that were there when somebody emptied it; those are that came later', async () => {
    await add('5-1', '6-0');
    await redis.xtrim(TOPIC, 'MAXLEN', 0);
    expect(await restorer.absent(TOPIC, ['5-1', '6-0', '6-1'], false)).toMatchObject({
      lost: ['6-1'],
      trimmed: 2,
    });
  });

  test('all are lost of a stream that was made anew for its consumer group', async () => {
    await redis.xgroup('CREATE', TOPIC, 'group', '0', 'MKSTREAM');
    expect(await restorer.absent(TOPIC, ['1-0'], false)).toMatchObject({ lost: ['1-0'], trimmed: 0 });
  });

  test('nothing can be said when its key holds something else', async () => {
    await redis.set(TOPIC, 'a string');
    expect(await restorer.absent(TOPIC, ['1-0'], false)).toEqual({ lost: [], trimmed: 0, unreadable: true });
  });

  test.each([
    ['gone', async () => {}, '1-0'],
    [
      'emptied',
      async () => {
        await add('5-1');
        await redis.xtrim(TOPIC, 'MAXLEN', 0);
      },
      '5-2',
    ],
  ])('of a stream that was %s, those that are not restored yet are lost still', async (_, prepare, lost) => {
    await prepare();
    const absent = () => restorer.absent(TOPIC, [lost], true);
    expect(await absent()).toMatchObject({ lost: [lost], trimmed: 0 });
    await restorer.entry(aClaimedEvent(), GUARD);
    expect(await absent()).toMatchObject({ lost: [lost], trimmed: 0 });
  });

  test('ids are compared as numbers', async () => {
    await add('999-9', '1000-10');
    expect(await restorer.absent(TOPIC, ['999-10', '1000-9', '998-11'], false)).toEqual({
      ...{ lost: ['999-10', '1000-9'], trimmed: 1, unreadable: false },
    });
  });
});

describe('the entry of an event', () => {
  test('is found among the latest of its stream, others are not', async () => {
    const events = Array.from({ length: 2_500 }, () => aClaimedEvent());
    const pipeline = redis.pipeline();
    for (const [i, { eventId }] of events.entries())
      pipeline.xadd(TOPIC, `1-${i}`, 'event_id', eventId, 'n', i);
    await pipeline.exec();
    const wanted = [events[0], events[1_000], events[2_499], aClaimedEvent()].map(
      (it) => it?.eventId as string,
    );
    expect(Object.fromEntries(await restorer.find(TOPIC, wanted))).toEqual({
      [wanted[0] as string]: '1-0',
      [wanted[1] as string]: '1-1000',
      [wanted[2] as string]: '1-2499',
    });
    // Redis copies whole entries: never more of them than that at once.
    await redis.config('RESETSTAT');
    await restorer.find(TOPIC, ['none']);
    const steps = /cmdstat_xrevrange:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1];
    expect(Number(steps)).toBeGreaterThanOrEqual(25);
    expect((await restorer.find('no.such.stream', wanted)).size).toBe(0);
    await redis.set('a.string', 'x');
    expect((await restorer.find('a.string', wanted)).size).toBe(0);
  });

  test('is its last one where it has several, and a dead letter that is known already is not looked for', async () => {
    const letter = (id: string, eventId: string, reason: string) =>
      redis.xadd(DLQ, id, 'event_id', eventId, 'error_message', reason, 'attempts', '6');
    await letter('1-1', 'replayed', 'first');
    await letter('1-2', 'replayed again', 'first');
    await letter('1-3', 'replayed again', 'second');
    await letter('1-4', 'new', 'only');
    const known = new Map([
      ['replayed', '1-1'],
      ['replayed again', '1-2'],
      ['new', null],
      ['none', null],
    ]);
    expect(Object.fromEntries(await restorer.findDeadLetters([...known.keys()], known))).toEqual({
      'replayed again': { entryId: '1-3', deadLetter: { attempts: 6, reason: 'second' } },
      new: { entryId: '1-4', deadLetter: { attempts: 6, reason: 'only' } },
    });
  });
});

describe('an entry that was lost', () => {
  test('is restored once, however often', async () => {
    const event = aClaimedEvent();
    const first = await restorer.entry(event, GUARD);
    expect(first.status).toBe('restored');
    expect(await Promise.all([restorer.entry(event, GUARD), restorer.entry(event, GUARD)])).toEqual([
      first,
      first,
    ]);
    expect(await readStream(redis, TOPIC)).toMatchObject([
      { event_id: event.eventId, payload: event.payload },
    ]);
  });

  test('is restored again when it is lost again', async () => {
    const event = aClaimedEvent();
    await restorer.entry(event, GUARD);
    await redis.del(TOPIC);
    await restorer.entry(event, GUARD);
    expect(await readStream(redis, TOPIC)).toHaveLength(1);
  });

  test('is remembered by a publish job that came back, which then does not append it', async () => {
    const event = aClaimedEvent();
    await redis.hset(jobKey(event.eventId), { timestamp: '1' });
    const outcome = await restorer.entry(event, GUARD);
    expect(await redis.hget(jobKey(event.eventId), 'relay:entry')).toBe(
      outcome.status === 'restored' && outcome.entryId,
    );
  });

  test('is not restored when a publish job that came back has appended it', async () => {
    const event = aClaimedEvent();
    const entryId = await redis.xadd(TOPIC, '*', 'event_id', event.eventId);
    await redis.hset(jobKey(event.eventId), { timestamp: '1', 'relay:entry': entryId as string });
    expect(await restorer.entry(event, GUARD)).toEqual({ status: 'restored', entryId });
    expect(await readStream(redis, TOPIC)).toHaveLength(1);
  });

  test('is restored by nobody whose comparison is void', async () => {
    await redis.set(EPOCH_KEY, 'checking:another');
    await expect(restorer.entry(aClaimedEvent(), GUARD)).rejects.toThrow(NotOurEpochError);
    await redis.del(EPOCH_KEY);
    await expect(restorer.entry(aClaimedEvent(), GUARD)).rejects.toThrow(NotOurEpochError);
    expect(await redis.exists(TOPIC)).toBe(0);
  });

  test('of a dead letter has what the row says', async () => {
    const event = aClaimedEvent({ attempts: 6 });
    const failure = { reason: 'WRONGTYPE', attempts: 6, failedAt: new Date('2026-01-02T03:04:05.678Z') };
    await restorer.deadLetter(event, failure, GUARD);
    expect(await readStream(redis, DLQ)).toMatchObject([
      { original_event_id: event.eventId, error_message: 'WRONGTYPE', failed_at: '2026-01-02T03:04:05.678Z' },
    ]);
  });

  test('that Redis refuses is told apart from a Redis that can take nothing', async () => {
    await redis.set('broken', 'a string');
    expect(await restorer.entry(aClaimedEvent({ topic: 'broken' }), GUARD)).toEqual({
      status: 'refused',
      reason: expect.stringMatching(/^WRONGTYPE/),
    });
    await redis.config('SET', 'maxmemory', '1');
    try {
      await expect(restorer.entry(aClaimedEvent(), GUARD)).rejects.toThrow(/OOM/);
    } finally {
      await redis.config('SET', 'maxmemory', '0');
    }
  });
});
