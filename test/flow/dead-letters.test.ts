/** Dead letters as their operators meet them: `relay dlq` and `relay republish` beside relays at work. */
import { expect, test } from 'vitest';
import { deadLetterFields } from '../../src/streams/envelope.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { DLQ, STREAM, type Stage, setStage } from '../support/flow.ts';
import { aClaimedEvent } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

/** A topic whose key holds a string: Redis refuses every append to it. */
const BROKEN = 'identity.broken.v1';
/** Dead letters that a replay takes at a time. */
const REPLAY_BATCH = 200;
const FORBIDDEN = 'payments.v1';
const QUICK = {
  ...{ RELAY_MAX_RETRY_ATTEMPTS: '0', RELAY_ALLOWED_TOPICS: 'identity.*', RELAY_MAX_EVENT_BYTES: '4096' },
  ...{ RELAY_POLL_INTERVAL: '0.5', RELAY_FAILED_JOBS_KEPT: '2000' },
};

const idsOf = (events: readonly { eventId: string }[]) => events.map((event) => event.eventId);
const eventIds = async (stage: Stage, stream = STREAM) =>
  (await stage.entries(stream)).map(({ fields }) => fields.event_id as string);

/** What `relay <args>` printed, which must not fail. */
async function relay(stage: Stage, ...args: string[]): Promise<string> {
  const { code, lines } = await stage.command(args);
  expect(code, lines.join('\n')).toBe(0);
  return lines.join('\n');
}
const json = async (stage: Stage, ...args: string[]) => JSON.parse(await relay(stage, ...args, '--json'));

test('1,000 dead letters of three kinds: one kind is replayed while new events flow, killed half-way, and run again', async () => {
  const stage = await setStage({ env: QUICK });
  await stage.redis.set(BROKEN, 'a string');
  const broken = someEvents(600, 200, { topic: BROKEN });
  const forbidden = someEvents(250, 250, { topic: FORBIDDEN, eventType: 'Paid', payload: { n: 1 } });
  const large = someEvents(150, 150, { eventType: 'Sized', payload: { text: 'x'.repeat(5_000) } });
  await insertEvents(stage.pool, [...broken, ...forbidden, ...large]);
  await stage.pod();
  await stage.rested();

  const { groups } = await json(stage, 'dlq', 'list', '--group');
  expect(groups).toMatchObject([
    { count: 600, error: expect.stringContaining('WRONGTYPE'), eventTypes: ['UserCreated'] },
    { count: 250, error: expect.stringContaining('RELAY_ALLOWED_TOPICS'), eventTypes: ['Paid'] },
    { count: 150, error: expect.stringContaining('event has # bytes'), eventTypes: ['Sized'] },
  ]);
  const page = await json(stage, 'dlq', 'list', '--error', 'wrongtype', '--limit', '599');
  expect(page.letters).toHaveLength(599);
  const rest = await json(stage, 'dlq', 'list', '--error', 'wrongtype', '--after', page.next);
  expect([...idsOf(page.letters), ...idsOf(rest.letters)].toSorted()).toEqual(idsOf(broken).toSorted());

  // New events of the same aggregates come all the while.
  await stage.redis.del(BROKEN);
  const fresh: string[] = [];
  let flowing = true;
  const flow = (async () => {
    for (let i = 0; flowing; i++) {
      const { aggregateId } = broken[i % 200] as { aggregateId: string };
      const event = anEvent({ aggregateId, topic: BROKEN });
      fresh.push(event.eventId);
      await insertEvents(stage.pool, [event]);
    }
  })();
  const replay = ['dlq', 'replay', '--topic', BROKEN];
  const killed = await stage.spawn([...replay, '--yes']);
  await waitFor(() => stage.count('replayed_at IS NOT NULL'), { what: 'the first batch', pollMs: 15 });
  await killed.kill('SIGKILL');
  const replayed = await stage.count('replayed_at IS NOT NULL');
  expect(replayed).toBeLessThan(600);
  expect(await relay(stage, ...replay, '--dry-run')).toContain(
    `${600 - replayed} dead letters would be replayed.`,
  );
  const output = await relay(stage, ...replay, '--yes');
  expect(output).toMatch(new RegExp(`^\\S+ replayed ${600 - replayed} dead letters\\.$`, 'm'));
  expect(output).toContain('100%');
  flowing = false;
  await flow;
  await stage.rested();

  const entries = await stage.entries(BROKEN);
  const all = [...idsOf(broken), ...fresh];
  expect(entries.map(({ fields }) => fields.event_id).toSorted()).toEqual(all.toSorted());
  // In order: the replayed ones among themselves, and the new ones.
  for (const some of [new Set(idsOf(broken)), new Set(fresh)]) {
    const place = new Map(all.map((id, i) => [id, i]));
    const last = new Map<string, number>();
    for (const { fields } of entries) {
      if (!some.has(fields.event_id as string)) continue;
      const at = place.get(fields.event_id as string) as number;
      expect(at).toBeGreaterThan(last.get(fields.aggregate_id as string) ?? -1);
      last.set(fields.aggregate_id as string, at);
    }
  }
  // The other kinds are where they were.
  expect(await stage.count('NOT published AND dead_lettered_at IS NOT NULL')).toBe(400);
  const letters = await eventIds(stage, DLQ);
  const replayedOnes = new Set(idsOf(broken));
  const others = letters.filter((it) => !replayedOnes.has(it));
  expect(others.toSorted()).toEqual(idsOf([...forbidden, ...large]).toSorted());
  // The kill may have come between the commit of a batch and the removal of its entries.
  expect(letters.length - others.length).toBeLessThanOrEqual(REPLAY_BATCH);
});

test('an event of a hot aggregate that is replayed at once takes nothing along that was published since', async () => {
  const stage = await setStage({ env: { ...QUICK, RELAY_POLL_INTERVAL: '0.1' } });
  await stage.redis.set(BROKEN, 'a string');
  const { aggregateId } = anEvent();
  const [before, ...behind] = someEvents(60, 1, { aggregateId });
  // The second one is the first that is read behind, and does not get there.
  const dead = anEvent({ aggregateId, topic: BROKEN });
  await insertEvents(stage.pool, [before as never, dead, ...behind]);
  await stage.pod();
  await waitFor(() => stage.count(`event_id = '${dead.eventId}' AND dead_lettered_at IS NOT NULL`), {
    what: 'the event to be dead',
  });
  const diedAt = performance.now();
  await stage.rested();
  await stage.redis.del(BROKEN);
  await stage.pool.query(
    `UPDATE identity.outbox SET dead_lettered_at = NULL, next_attempt_at = NULL, attempts = 1 WHERE event_id = $1`,
    [dead.eventId],
  );
  await stage.rested();
  // Not when its lease ends, which is a minute away.
  expect(performance.now() - diedAt).toBeLessThan(45_000);
  // What would be brought along has its place by now.
  const last = anEvent({ aggregateId });
  await insertEvents(stage.pool, [last]);
  await stage.rested();
  expect(await eventIds(stage)).toEqual(idsOf([before as never, ...behind, last]));
  expect(await eventIds(stage, BROKEN)).toEqual([dead.eventId]);
});

test('what is dead is listed, shown, replayed and discarded; what is held goes on', async () => {
  const stage = await setStage({ env: { ...QUICK, RELAY_DEAD_LETTER_POLICY: 'hold' } });
  await stage.redis.set(BROKEN, 'a string');
  const [first, second] = [
    anEvent({ topic: BROKEN }),
    anEvent({ topic: BROKEN, eventType: 'Paid', payload: { n: 1 } }),
  ];
  const behind = [first, second].flatMap(({ aggregateId }) => someEvents(2, 1, { aggregateId }));
  await insertEvents(stage.pool, [first, second, ...behind]);
  await stage.pod();
  await waitFor(async () => (await stage.count(`next_attempt_at = 'infinity'`)) === 6, {
    what: 'both to be held',
  });

  const table = await relay(stage, 'dlq', 'list');
  for (const text of [first.eventId, `user:${second.aggregateId}`, BROKEN, 'WRONGTYPE', 'Paid'])
    expect(table).toContain(text);
  expect(table).not.toContain('@example.com');
  expect(await relay(stage, 'dlq', 'list', '--group')).toMatch(
    /^ +2 .*WRONGTYPE.*\n +Paid, UserCreated, e\.g\. /m,
  );
  expect((await json(stage, 'dlq', 'list', '--aggregate', `user:${first.aggregateId}`)).letters).toHaveLength(
    1,
  );
  expect((await json(stage, 'dlq', 'list', '--since', '1h', '--until', '30m')).letters).toHaveLength(0);
  const shown = await relay(stage, 'dlq', 'show', first.eventId);
  expect(shown).toMatch(/state +dead\nattempts +1\nerror +WRONGTYPE/);
  expect(shown).toMatch(/job +failed, 1 attempt$/m);
  expect(shown).toMatch(/payload +\{.*@example\.com/);
  expect(shown).toMatch(
    /Z +created\n.*Z +last attempt begun\n.*Z +last attempt failed, none is left\n.*Z +dead-lettered after 1 attempt$/m,
  );

  // Nothing happens by accident.
  for (const [args, reason] of [
    [['replay'], 'say --all'],
    [['replay', '--all'], 'say --yes'],
    [['replay', 'x'], 'Expected an event_id'],
    [['discard', first.eventId, '--yes'], '--reason'],
    [['show', anEvent().eventId], 'knows'],
  ] as const) {
    const { code, lines } = await stage.command(['dlq', ...args]);
    expect(code, args.join(' ')).toBe(1);
    expect(lines.join('\n')).toContain(reason);
  }
  expect(await stage.count('NOT published AND dead_lettered_at IS NOT NULL')).toBe(2);

  expect(await relay(stage, 'dlq', 'discard', second.eventId, '--reason', 'obsolete', '--yes')).toMatch(
    /^\S+ discarded 1 dead letter\.$/m,
  );
  await stage.redis.del(BROKEN);
  await relay(stage, 'dlq', 'replay', first.eventId, '--yes');
  await stage.rested();
  expect(await eventIds(stage, BROKEN)).toEqual([first.eventId]);
  expect((await eventIds(stage)).toSorted()).toEqual(idsOf(behind).toSorted());
  expect(await relay(stage, 'dlq', 'show', second.eventId)).toMatch(
    /state +discarded[\s\S]*discarded by \S+: obsolete/,
  );
  expect(await stage.redis.xlen(DLQ)).toBe(0);
  await stage.expectPromisesHeld();
});

test('an event is replayed from its row when its dead letter was trimmed, and from its dead letter when its row is gone', async () => {
  const stage = await setStage({ env: QUICK });
  await stage.redis.set(BROKEN, 'a string');
  const [pruned, trimmed] = someEvents(2, 2, { topic: BROKEN });
  await insertEvents(stage.pool, [pruned, trimmed] as never);
  await stage.pod();
  await stage.rested();
  await stage.redis.xdel(DLQ, (await stage.row(trimmed?.eventId as string)).stream_entry_id as string);
  await stage.pool.query('DELETE FROM identity.outbox WHERE event_id = $1', [pruned?.eventId]);
  await stage.redis.del(BROKEN);
  expect(await relay(stage, 'dlq', 'list', '--pruned')).toContain(pruned?.eventId);
  expect(await relay(stage, 'dlq', 'show', pruned?.eventId as string)).toContain('the row is gone');
  const both = ['dlq', 'replay', ...idsOf([pruned, trimmed] as never), '--yes'];
  await relay(stage, ...both);
  await stage.rested();
  const again = await stage.command(both);
  expect(again.code).toBe(1);
  expect(again.lines.join('\n')).toContain('it is not dead');
  expect((await eventIds(stage, BROKEN)).toSorted()).toEqual(idsOf([pruned, trimmed] as never).toSorted());
  await stage.expectPromisesHeld();

  // Once published, and pruned after that: an old dead letter that somebody kept is no reason to publish it again.
  await stage.pool.query('DELETE FROM identity.outbox WHERE event_id = $1', [pruned?.eventId]);
  const old = aClaimedEvent({ ...(pruned as object), payload: '{}', topic: BROKEN } as never);
  await stage.redis.xadd(
    DLQ,
    '*',
    ...deadLetterFields(old, { reason: 'x', attempts: 1, failedAt: new Date() }),
  );
  const { code, lines } = await stage.command(['dlq', 'replay', '--pruned', '--yes']);
  expect(code).toBe(1);
  expect(lines.join('\n')).toContain('it is in its stream already');
});

test('relay republish appends what was published again, marked, in order, and verify goes on being right', async () => {
  const stage = await setStage({ env: QUICK });
  await stage.pod();
  const events = someEvents(60, 6);
  await insertEvents(stage.pool, events);
  await stage.rested();
  const first = await eventIds(stage);
  const republish = ['republish', '--since', '1h', '--until', '0s'];
  expect(await relay(stage, ...republish, '--dry-run')).toMatch(
    /60 +identity\.user\.v1\n60 events would be appended again/,
  );
  for (const [args, reason] of [
    [republish, 'say --yes'],
    [['republish', '--since', '1h', '--yes'], '--until'],
  ] as const) {
    const { code, lines } = await stage.command(args);
    expect(code).toBe(1);
    expect(lines.join('\n')).toContain(reason);
  }
  expect(await stage.redis.xlen(STREAM)).toBe(60);
  expect(await relay(stage, ...republish, '--yes')).toMatch(/\S+ appended 60 events again\./);
  const entries = await stage.entries();
  expect(entries.map(({ fields }) => fields.event_id)).toEqual([...first, ...first]);
  expect(entries.map(({ fields }) => fields.replayed_at !== undefined)).toEqual(
    entries.map((_, i) => i >= 60),
  );
  expect(await relay(stage, 'verify', '--since', '1h')).toContain('Nothing is missing.');

  // Nor is an entry id changed: after a loss the stream is what it was at first.
  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) === 60, { what: 'the entries to be restored' });
  expect((await eventIds(stage)).toSorted()).toEqual(first.toSorted());
});
