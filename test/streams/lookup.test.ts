import { beforeEach, describe, expect, test } from 'vitest';
import { keysOf } from '../../src/streams/epoch-script.ts';
import { createLookup, UnreadableError } from '../../src/streams/lookup.ts';
import { asRelay, redisRules } from '../support/least-privilege.ts';
import { createRedis } from '../support/servers.ts';
import { aClaimedEvent, openAdminRedis, openRedis } from '../support/stages.ts';

const TOPIC = 'identity.user.v1';
const DLQ = 'identity.user.v1.dlq';
const EPOCH_KEY = 'bull:relay:epoch';
const OPTIONS = {
  ...{ dlqStreamName: DLQ, epochKey: EPOCH_KEY },
  topicProblem: (topic: string) => (topic.startsWith('bull:') ? 'a key of BullMQ' : null),
};

const server = await createRedis();
const redis = openAdminRedis(server.adminUrl);
const lookup = createLookup(openRedis(server.url), OPTIONS);

beforeEach(async () => {
  await redis.flushall();
});

const notes = () => redis.hgetall(keysOf(EPOCH_KEY).lastEntries);

/** Entries of the event `x`. */
const add = async (...ids: string[]) => {
  for (const id of ids) await redis.xadd(TOPIC, id, 'event_id', 'x');
};
/** Which of these entries of the event `x` are not there. */
async function absent(...ids: string[]) {
  const entries = ids.map((entryId) => ({ entryId, eventId: 'x' }));
  const { lost, ...rest } = await lookup.absent(TOPIC, entries, false);
  return { lost: lost.map((it) => it.entryId), ...rest };
}

describe('of the entries that a stream should have', () => {
  test('those are lost that are not there, and those trimmed that are older than its first', async () => {
    await add('5-1', '5-3', '9-0');
    expect(await absent('3-7', '5-0', '5-1', '5-2', '5-3', '9-0', '9-1', '10-0')).toEqual({
      lost: ['5-2', '9-1', '10-0'],
      trimmed: 2,
      unreadable: false,
    });
  });

  test('those are lost that are another event’s by now', async () => {
    await redis.xadd(TOPIC, '5-1', 'event_id', 'mine', 'n', '1');
    await redis.xadd(TOPIC, '5-2', 'event_id', 'another’s');
    await redis.xadd(TOPIC, '5-3', 'original_event_id', 'mine');
    const rows = ['5-1', '5-2', '5-3'].map((entryId, id) => ({ id, entryId, eventId: 'mine' }));
    expect(await lookup.absent(TOPIC, rows, false)).toEqual({
      ...{ lost: [rows[1], rows[2]], trimmed: 0, unreadable: false },
    });
  });

  test('those are lost, each by itself, whose ids are none', async () => {
    await add('5-1', '5-2');
    const junk = ['garbage', '99999999999999999999-1', '', '-', '+', '5-1-1', '1-99999999999999999999', '7-'];
    const { lost, ...rest } = await absent('5-1', ...junk, '5-2', '5-0');
    expect(lost.sort()).toEqual(junk.filter((it) => it !== '1-99999999999999999999').sort());
    expect(rest).toEqual({ trimmed: 2, unreadable: false });
    await redis.xtrim(TOPIC, 'MAXLEN', 0);
    expect((await absent('garbage', '99999999999999999999-1')).lost).toHaveLength(2);
    await redis.del(TOPIC);
    expect((await absent('garbage', '99999999999999999999-1')).lost).toHaveLength(2);
  });

  test('all are lost when it is gone', async () => {
    expect(await absent('1-0', '2-0')).toEqual({ lost: ['1-0', '2-0'], trimmed: 0, unreadable: false });
  });

  test('none are that were there when somebody emptied it; those are that came later', async () => {
    await add('5-1', '6-0');
    await redis.xtrim(TOPIC, 'MAXLEN', 0);
    expect(await absent('5-1', '6-0', '6-1')).toEqual({ lost: ['6-1'], trimmed: 2, unreadable: false });
  });

  test('all are lost of a stream that was made anew for its consumer group', async () => {
    await redis.xgroup('CREATE', TOPIC, 'group', '0', 'MKSTREAM');
    expect(await absent('1-0')).toMatchObject({ lost: ['1-0'], trimmed: 0 });
  });

  test('nothing can be said when its key holds something else, or must not be read', async () => {
    await redis.set(TOPIC, 'a string');
    expect(await absent('1-0')).toEqual({ lost: [], trimmed: 0, unreadable: true });
    await redis.del(TOPIC);
    await redis.call('ACL', 'SETUSER', 'limited', ...redisRules({ RELAY_ALLOWED_TOPICS: TOPIC }));
    const limited = createLookup(openRedis(asRelay(server.url, 'limited')), OPTIONS);
    const row = { entryId: '1-0', eventId: 'x' };
    expect(await limited.absent('forbidden', [row], false)).toMatchObject({ lost: [], unreadable: true });
    expect(await limited.absent(TOPIC, [row], false)).toMatchObject({ lost: [row], unreadable: false });
  });

  test('nothing is said of a key that can be no stream of events, and it is not even noted', async () => {
    await redis.xadd('bull:relay-publish:events', '5-5', 'event', 'completed');
    const row = { entryId: '9-9', eventId: 'x' };
    expect(await lookup.absent('bull:relay-publish:events', [row], true)).toEqual({
      ...{ lost: [], trimmed: 0, unreadable: true },
    });
    expect(await notes()).toEqual({});
  });

  test('ids are compared as numbers', async () => {
    await add('999-9', '1000-10');
    expect(await absent('999-10', '1000-9', '998-11')).toEqual({
      ...{ lost: ['999-10', '1000-9'], trimmed: 1, unreadable: false },
    });
  });
});

describe('a comparison', () => {
  test('notes the last entry that each stream ever had, so that the stream is missed when it is gone', async () => {
    await add('5-1', '5-3');
    await redis.xadd('emptied', '7-7', 'event_id', 'x');
    await redis.xtrim('emptied', 'MAXLEN', 0);
    await redis.xgroup('CREATE', 'new', 'group', '0', 'MKSTREAM');
    await redis.set('string', 'x');
    for (const stream of [TOPIC, 'emptied', 'new', 'string', 'gone']) await lookup.absent(stream, [], true);
    expect(await notes()).toEqual({ [TOPIC]: '5-3', emptied: '7-7' });
  });

  test('that only looks notes nothing', async () => {
    await add('5-1');
    await absent('5-1', '5-2');
    expect(await notes()).toEqual({});
  });
});

describe('the entry of an event', () => {
  test('cannot be looked for while Redis refuses to let the relay read the stream, if the relay has entries there', async () => {
    await redis.call('ACL', 'SETUSER', 'limited', ...redisRules({ RELAY_ALLOWED_TOPICS: TOPIC }));
    const limited = createLookup(openRedis(asRelay(server.url, 'limited')), OPTIONS);
    await redis.xadd('forbidden', '5-1', 'event_id', 'x');
    // Never: a row may name a key that is not the relay's.
    expect(await limited.find('forbidden', ['x'])).toEqual(new Map());
    await lookup.absent('forbidden', [], true);
    await expect(limited.find('forbidden', ['x'])).rejects.toThrow(UnreadableError);
    // A comparison that may not read it remembers that much.
    await redis.del(keysOf(EPOCH_KEY).lastEntries);
    await limited.absent('forbidden', [{ entryId: '5-1', eventId: 'x' }], true);
    await expect(limited.find('forbidden', ['x'])).rejects.toThrow('forbidden');
    expect(await lookup.find('forbidden', ['x'])).toEqual(new Map([['x', '5-1']]));
  });

  test('is found among the latest of its stream, others are not', async () => {
    const events = Array.from({ length: 2_500 }, () => aClaimedEvent());
    const pipeline = redis.pipeline();
    for (const [i, { eventId }] of events.entries())
      pipeline.xadd(TOPIC, `1-${i}`, 'event_id', eventId, 'n', i);
    await pipeline.exec();
    const wanted = [events[0], events[1_000], events[2_499], aClaimedEvent()].map(
      (it) => it?.eventId as string,
    );
    expect(Object.fromEntries(await lookup.find(TOPIC, wanted))).toEqual({
      [wanted[0] as string]: '1-0',
      [wanted[1] as string]: '1-1000',
      [wanted[2] as string]: '1-2499',
    });
    // Redis copies whole entries: never more of them than that at once.
    await redis.config('RESETSTAT');
    await lookup.find(TOPIC, ['none']);
    expect(await steps()).toBeGreaterThanOrEqual(25);
    // It ends with the last one that was wanted.
    await redis.config('RESETSTAT');
    await lookup.find(TOPIC, [wanted[2] as string]);
    expect(await steps()).toBe(1);
    expect((await lookup.find('no.such.stream', wanted)).size).toBe(0);
    expect((await lookup.find(TOPIC, [])).size).toBe(0);
    await redis.set('a.string', 'x');
    expect((await lookup.find('a.string', wanted)).size).toBe(0);
  });

  test('is noted where its stream is not, so that the stream is missed when it is gone', async () => {
    const { eventId } = aClaimedEvent();
    for (const id of ['5-1', '5-3']) await redis.xadd(TOPIC, id, 'event_id', eventId);
    await lookup.find(TOPIC, [eventId]);
    expect(await notes()).toEqual({ [TOPIC]: '5-3' });
    await redis.hset(keysOf(EPOCH_KEY).lastEntries, TOPIC, '9-9');
    await lookup.find(TOPIC, [eventId]);
    expect(await notes()).toEqual({ [TOPIC]: '9-9' });
  });

  test('is not looked for without an end', async () => {
    const pipeline = redis.pipeline();
    pipeline.xadd(TOPIC, '1-0', 'event_id', 'old');
    pipeline.xadd(TOPIC, '1-1', 'event_id', 'oldest that is looked at');
    for (let i = 2; i <= 50_000; i++) pipeline.xadd(TOPIC, `1-${i}`, 'event_id', 'x');
    await pipeline.exec();
    const found = await lookup.find(TOPIC, ['old', 'oldest that is looked at']);
    expect([...found.keys()]).toEqual(['oldest that is looked at']);
  });

  test('is its last one where it has several; of dead letters all are found where all are wanted', async () => {
    await add('1-1', '1-2');
    await redis.xadd(TOPIC, '1-3', 'event_id', 'y');
    await add('1-4');
    expect(Object.fromEntries(await lookup.find(TOPIC, ['x', 'y', 'z']))).toEqual({ x: '1-4', y: '1-3' });
    for (const [id, eventId] of [
      ['1-1', 'x'],
      ['1-2', 'x'],
      ['1-3', 'y'],
      ['1-4', 'x'],
    ] as const)
      await redis.xadd(DLQ, id, 'event_id', eventId);
    expect(Object.fromEntries(await lookup.findAllDeadLetters(['x', 'y', 'z']))).toEqual({
      x: ['1-4', '1-2', '1-1'],
      y: ['1-3'],
    });
  });

  test('is one whose first field says so', async () => {
    await redis.xadd(TOPIC, '*', 'payload', 'x', 'event_id', 'x');
    expect((await lookup.find(TOPIC, ['x'])).size).toBe(0);
  });

  test('of a dead letter is not one that is known already', async () => {
    const letter = (id: string, eventId: string, reason: string) =>
      redis.xadd(DLQ, id, 'event_id', eventId, 'error_message', reason, 'attempts', '6');
    await letter('1-1', 'replayed', 'first');
    await letter('1-2', 'replayed again', 'first');
    await letter('1-3', 'replayed again', 'second');
    await letter('1-4', 'new', 'only');
    // What others write to this stream, such as a copy of an entry, gives up no event.
    await redis.xadd(DLQ, '1-5', 'event_id', 'copied', 'event_type', 'UserCreated');
    await redis.xadd(DLQ, '1-6', 'event_id', 'counted', 'attempts', '99999999999');
    const known = new Map<string, string | null>([
      ['replayed', '1-1'],
      ['replayed again', '1-2'],
      ['new', null],
      ...(['copied', 'counted', 'none'] as const).map((it) => [it, null] as const),
    ]);
    expect(Object.fromEntries(await lookup.findDeadLetters([...known.keys()], known))).toEqual({
      'replayed again': { entryId: '1-3', attempts: 6, reason: 'second' },
      new: { entryId: '1-4', attempts: 6, reason: 'only' },
    });
  });

  test('is not said to be absent by a Redis that does not answer, or refuses everybody', async () => {
    await redis.call('ACL', 'SETUSER', 'gone', ...redisRules({}, 'gone'));
    const gone = openRedis(asRelay(server.url, 'gone'), { retryStrategy: () => null });
    await gone.ping();
    gone.disconnect();
    const away = createLookup(gone, OPTIONS);
    await expect(away.find(TOPIC, ['x'])).rejects.toThrow();
    await expect(away.absent(TOPIC, [{ entryId: '1-1', eventId: 'x' }], false)).rejects.toThrow();
    await expect(away.findDeadLetters(['x'], new Map())).rejects.toThrow();
  });
});

/** Steps back through a stream since the statistics were reset. */
async function steps(): Promise<number> {
  return Number(/cmdstat_xrevrange:calls=(\d+)/.exec(await redis.info('commandstats'))?.[1] ?? 0);
}
