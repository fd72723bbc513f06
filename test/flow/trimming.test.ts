import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { expect, onTestFinished, test } from 'vitest';
import type { Status } from '../../src/operations/fleet-status.ts';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { deferred } from '../support/stages.ts';
import { waitFor } from '../support/wait.ts';

const ACKNOWLEDGED = { RELAY_STREAM_TRIM: 'acknowledged', RELAY_POLL_INTERVAL: '0.2' };

/**
 * A consumer as one in Python would be: XREADGROUP in a loop, json.loads of the payload, the event ids that it has
 * had in a set. It acknowledges a batch when it is through with it.
 */
async function startConsumer(stage: Stage, group: string, pause: (seen: number) => Promise<void>) {
  const redis = new Redis(stage.server.adminUrl);
  redis.on('error', () => {});
  await redis.xgroup('CREATE', STREAM, group, '0', 'MKSTREAM');
  const seen = new Set<string>();
  let stopped = false;
  const running = (async () => {
    while (!stopped) {
      const answer = await redis.xreadgroup(
        'GROUP',
        group,
        'py',
        'COUNT',
        20,
        'BLOCK',
        100,
        'STREAMS',
        STREAM,
        '>',
      );
      for (const [, entries] of (answer ?? []) as [string, [string, string[]][]][]) {
        for (const [, flat] of entries) {
          const fields = Object.fromEntries(
            flat.flatMap((it, i) => (i % 2 === 0 ? [[it, flat[i + 1]]] : [])),
          );
          JSON.parse(fields.payload ?? '');
          seen.add(fields.event_id ?? '');
        }
        await redis.xack(STREAM, group, ...entries.map(([entryId]) => entryId));
        await pause(seen.size);
      }
    }
  })();
  onTestFinished(async () => {
    stopped = true;
    await running.catch(() => {});
    redis.disconnect();
  });
  return { seen };
}

test('a consumer that lags misses nothing of a stream that is trimmed as soon as all have acknowledged', async () => {
  const stage = await setStage({ env: ACKNOWLEDGED });
  const quickIsDone = deferred();
  const slow = await startConsumer(stage, 'slow', (seen) =>
    seen < 1_000 ? Promise.resolve() : quickIsDone.promise.then(() => delay(20)),
  );
  onTestFinished(() => quickIsDone.resolve());
  const quick = await startConsumer(stage, 'quick', async () => {});
  await stage.pod();
  const events = someEvents(1_500, 100);
  await insertEvents(stage.pool, events);
  await waitFor(() => quick.seen.size === events.length, { what: 'the quick one to have read everything' });
  await waitFor(async () => (await stage.redis.xlen(STREAM)) < 1_200, {
    what: 'the stream to be trimmed while the slow one still reads',
  });
  expect(slow.seen.size).toBeLessThan(events.length);
  quickIsDone.resolve();
  await waitFor(() => slow.seen.size === events.length, { what: 'the slow one to have read everything' });
  for (const { seen } of [slow, quick]) expect(seen).toEqual(new Set(events.map((it) => it.eventId)));
  await waitFor(async () => (await stage.redis.xlen(STREAM)) <= 100, { what: 'the rest to be trimmed' });

  // The pods tell of the same streams, for whoever asks for the status.
  const told = await waitFor(
    async () => {
      const { code, lines } = await stage.command(['status', '--json']);
      expect(code, lines.join('\n')).toBe(0);
      const { figures } = JSON.parse(lines.join('\n')) as Status;
      return figures.streams?.some(({ stream }) => stream === STREAM) ? figures.streams : null;
    },
    { what: 'the stream to be told of' },
  );
  expect(told[0]?.groups.map(({ group, pending }) => [group, pending]).toSorted()).toEqual([
    ['quick', 0],
    ['slow', 0],
  ]);
});

test('a loss of Redis’ data is mended as ever: what was trimmed stays away, what was lost comes back', async () => {
  const stage = await setStage({ env: ACKNOWLEDGED });
  await stage.redis.xgroup('CREATE', STREAM, 'group', '0', 'MKSTREAM');
  await stage.pod();
  await insertEvents(stage.pool, someEvents(300, 300));
  await stage.rested();
  const entries = await stage.entries();
  // Read so far, and restarted.
  await stage.redis.xgroup('SETID', STREAM, 'group', entries[249]?.entryId as string);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) < 150, { what: 'the stream to be trimmed' });
  const kept = await stage.redis.xlen(STREAM);
  // Redis comes back without the last twenty.
  await stage.redis.xdel(STREAM, ...entries.slice(-20).map(({ entryId }) => entryId));
  await stage.server.restart();
  const event = anEvent();
  await insertEvents(stage.pool, [event]);
  await stage.rested();
  const ids = (await stage.entries()).map(({ fields }) => fields.event_id);
  expect(ids.at(-1)).toBe(event.eventId);
  expect(ids.length).toBeLessThanOrEqual(kept + 1);
  for (const { fields } of entries.slice(250))
    expect(ids.filter((it) => it === fields.event_id)).toHaveLength(1);

  // Without the stream, its groups and the list of streams: all of it comes back, and is trimmed again later.
  await stage.redis.flushall();
  await waitFor(async () => (await stage.redis.xlen(STREAM)) === 301, {
    what: 'the entries to be there again',
  });
  await stage.redis.xgroup('CREATE', STREAM, 'group', '$');
  await insertEvents(stage.pool, [anEvent()]);
  await waitFor(async () => (await stage.redis.xlen(STREAM)) < 102, {
    what: 'the stream to be trimmed again',
  });
});
