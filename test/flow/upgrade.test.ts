/** The build before had no gate: its pods must have ended before this one works, and it left jobs behind. */
import { expect, test } from 'vitest';
import type { PodFacts } from '../../src/operations/heartbeat.ts';
import type { Pod } from '../demo/pod.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { aClaimedEvent } from '../support/stages.ts';
import { PATIENCE_MS, waitFor } from '../support/wait.ts';

const PODS = 'bull:relay:pods';
const OLD_POD = 'old-host/17';

/** A heartbeat as the build before wrote it, `secondsAgo`. */
async function beat(stage: Stage, secondsAgo = 0): Promise<void> {
  const facts: PodFacts = {
    ...{ pod: OLD_POD, version: '0.0.9', phase: 'running', upSeconds: 100, inProgress: 1 },
    ...{ concurrency: 200, tickSecondsAgo: 1 },
  };
  await stage.redis.hset(PODS, OLD_POD, `${Date.now() - secondsAgo * 1_000} ${JSON.stringify(facts)}`);
}

async function readiness(pod: Pod): Promise<{ code: number; status?: string; reason?: string }> {
  const response = await fetch(`${pod.url}/readyz`).catch(() => null);
  return response === null ? { code: 0 } : { code: response.status, ...((await response.json()) as object) };
}

/** Resolves when the pod says that it waits for the old one. */
const saysThatItWaits = (pod: Pod) =>
  waitFor(async () => (await readiness(pod)).reason?.includes(OLD_POD), {
    what: 'the pod to say that it waits',
  });

const warnings = (pod: Pod) => pod.logs().filter(({ level }) => level === 'warn');

test('a pod waits while one of the build before is at work, says so, and goes on when that one has ended', async () => {
  const stage = await setStage();
  await insertEvents(stage.pool, someEvents(10));
  await beat(stage);
  const pod = await stage.spawn(['start']);
  await saysThatItWaits(pod);
  expect(await readiness(pod)).toMatchObject({ code: 503, status: 'starting' });
  // It tells others of itself meanwhile.
  const mine = Object.entries(await stage.redis.hgetall(PODS)).filter(([name]) => name !== OLD_POD);
  expect(mine).toHaveLength(1);
  expect(JSON.parse((mine[0]?.[1] ?? '').replace(/^\d+ /, ''))).toMatchObject({
    ...{ protocol: 3, phase: 'starting' },
  });
  // It goes on to wait for as long as the old one is heard of, claims nothing, and repeats nothing.
  const looks = async () =>
    Number(/cmdstat_hvals:calls=(\d+)/.exec(await stage.redis.info('commandstats'))?.[1] ?? 0);
  const before = await looks();
  await waitFor(
    async () => {
      await beat(stage);
      return (await looks()) >= before + 5;
    },
    { what: 'the pod to look several times' },
  );
  expect(await stage.count('next_attempt_at IS NOT NULL OR published')).toBe(0);
  expect(await stage.redis.exists('bull:relay-publish:id', 'bull:relay:epoch')).toBe(0);
  expect(warnings(pod)).toEqual([
    expect.objectContaining({ pods: [OLD_POD], msg: expect.stringContaining('stop the old ones first') }),
  ]);
  expect((await fetch(`${pod.url}/livez`)).status).toBe(200);

  await stage.redis.hdel(PODS, OLD_POD);
  await pod.waitReady(PATIENCE_MS);
  expect((await readiness(pod)).reason).toBeUndefined();
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({ entries: 10 });
  // Beside a pod of its own build it does not wait.
  expect(warnings(await stage.pod())).toEqual([]);
});

test('a pod of the build before that was killed is waited for until it has been silent for 15 s', async () => {
  const stage = await setStage();
  const heardAt = Date.now() - 5_000;
  await beat(stage, 5);
  const pod = await stage.spawn(['start']);
  await saysThatItWaits(pod);
  await pod.waitReady(PATIENCE_MS);
  expect(Date.now() - heardAt).toBeGreaterThanOrEqual(15_000);
  // It is forgotten later: its heartbeat is still there.
  expect(await stage.redis.hexists(PODS, OLD_POD)).toBe(1);
});

test('SIGTERM ends a pod at once that waits for one of the build before', async () => {
  const stage = await setStage({ env: { RELAY_SHUTDOWN_TIMEOUT: '60' } });
  await beat(stage);
  const pod = await stage.spawn(['start']);
  await saysThatItWaits(pod);
  const signalledAt = Date.now();
  expect(await pod.kill('SIGTERM')).toEqual({ code: 0, signal: null });
  expect(Date.now() - signalledAt).toBeLessThan(15_000);
  expect(await stage.redis.hkeys(PODS)).toEqual([OLD_POD]);
});

test('jobs that the build before left are published once and in order, those that it had appended are not again', async () => {
  const stage = await setStage({ env: { RELAY_POLL_INTERVAL: '1', RELAY_RETRY_BASE_DELAY: '0.5' } });
  const EACH = 8;
  const events = someEvents(4 * EACH, 4);
  const ids = await insertEvents(stage.pool, events);
  const ofAggregate = (n: number) =>
    events.flatMap((event, i) => (i % 4 === n ? [{ event, id: ids[i] as string }] : []));
  const [ahead = [], plain = [], appended = [], retrying = []] = [0, 1, 2, 3].map(ofAggregate);
  type One = (typeof ahead)[number];
  const publish = stage.queue('publish');
  const backoff = { type: 'exponential', delay: 500 };
  const add = async ({ event, id }: One, chain: object | undefined, delay = 0): Promise<string> => {
    const { eventId, eventType, aggregateId, createdAt } = event;
    const data = aClaimedEvent({
      ...{ id, eventId, eventType, aggregateId, occurredAt: createdAt.toISOString() },
      ...{ payload: JSON.stringify(event.payload), ...(chain && { chain }) },
    });
    await publish.add(eventType, data, {
      jobId: eventId,
      attempts: 6,
      backoff,
      removeOnComplete: true,
      delay,
    });
    return publish.toKey(eventId);
  };
  // As the build before left them: the first row of each aggregate leased, the others parked, jobs for some of these.
  await stage.pool.query(`UPDATE identity.outbox SET next_attempt_at = 'infinity'`);
  const lease = (row: One | undefined) =>
    stage.pool.query(`UPDATE identity.outbox SET next_attempt_at = now() + interval '1 h' WHERE id = $1`, [
      row?.id,
    ]);
  const names = (rows: readonly One[]) => rows.map(({ event: { eventId }, id }) => ({ id, eventId }));
  const chainOf = (rows: readonly One[], i: number) => ({
    ...{ reading: 'x', epoch: 'y', receipts: [], leads: i === 0 },
    ...{ after: names(rows.slice(0, i)), rest: names(rows.slice(i + 1)) },
  });
  await lease(ahead[0]);
  // The first one last: who comes before it must find out that it is to be published.
  for (let i = 5; i >= 0; i--) await add(ahead[i] as One, chainOf(ahead.slice(0, 6), i), i === 0 ? 1_500 : 0);
  await lease(plain[0]);
  await add(plain[0] as One, undefined);
  await lease(appended[0]);
  for (const [i, row] of appended.slice(0, 3).entries()) {
    const job = await add(row, chainOf(appended.slice(0, 3), i));
    const { eventId, aggregateId } = row.event;
    const entryId = await stage.redis.xadd(STREAM, '*', 'event_id', eventId, 'aggregate_id', aggregateId);
    await stage.redis.hset(job, 'relay:entry', entryId as string);
  }
  const retry = await add(retrying[0] as One, undefined, 3_000);
  await stage.redis.hset(retry, { atm: 1, failedReason: 'no' });
  await stage.pool.query(
    `UPDATE identity.outbox SET attempts = 1, error_message = 'no', next_attempt_at = now() + interval '3 s' WHERE id = $1`,
    [retrying[0]?.id],
  );
  await Promise.all([stage.pod(), stage.pod()]);
  await stage.rested();
  expect(await stage.expectPromisesHeld()).toMatchObject({
    events: 4 * EACH,
    entries: 4 * EACH,
    deadLetters: 0,
  });
  expect(await stage.count('attempts > 0')).toBe(1);
  await waitFor(async () => (await publish.getJobCountByTypes('waiting', 'active', 'delayed')) === 0, {
    what: 'no job to be left',
  });
});
