import { expect, test } from 'vitest';
import { createComparison } from '../../src/comparison.ts';
import type { SampleEvent } from '../../src/demo/sample.ts';
import { createReceipts } from '../../src/outbox/receipts.ts';
import { createRestorer } from '../../src/stream/restore.ts';
import { totals } from '../../src/triage/resync.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { createDatabase, createRedis } from '../support/servers.ts';
import { openAdminPool, openAdminRedis, openPool, openRedis, readStream, silent } from '../support/stages.ts';

const STREAM = 'identity.user.v1';
const DLQ = 'identity.user.v1.dlq';
const GUARD = 'checking:me';

const [database, server] = await Promise.all([createDatabase(), createRedis()]);
const pool = openAdminPool(database.adminUrl);
const redis = openAdminRedis(server.adminUrl);
const restorer = createRestorer(openRedis(server.url), {
  ...{ dlqStreamName: DLQ, streamMaxLen: 0, dlqMaxLen: 0 },
  ...{ jobKey: (eventId) => `bull:relay-publish:${eventId}`, epochKey: 'bull:relay:epoch' },
});
const receipts = createReceipts(openPool(database.url), {
  ...{ streamName: STREAM, maxEventBytes: 1 << 20, statementTimeoutMs: 5_000 },
});

test('a dead letter that was lost is restored; not so of an event that is replayed, or published, meanwhile', async () => {
  const events = someEvents(3) as [SampleEvent, SampleEvent, SampleEvent];
  const [, replayed, published] = await insertEvents(pool, events);
  await pool.query(
    `UPDATE identity.outbox SET dead_lettered_at = now(), next_attempt_at = 'infinity', stream_entry_id = '1-' || id`,
  );
  await redis.set('bull:relay:epoch', GUARD);
  const compare = createComparison(
    restorer,
    {
      ...receipts,
      // After it was found that the entries are lost, and before they are restored.
      events: async (ids) => {
        await pool.query(
          `UPDATE identity.outbox SET dead_lettered_at = NULL, next_attempt_at = NULL, published = id = $2,
                  stream_entry_id = CASE id WHEN $2 THEN '9-9' ELSE stream_entry_id END
           WHERE id IN ($1, $2)`,
          [replayed, published],
        );
        return receipts.events(ids);
      },
    },
    DLQ,
    silent,
  );
  const found = await compare({ since: '2020-01-01T00:00:00Z', until: 'infinity', guard: GUARD });
  expect((await readStream(redis, DLQ)).map((it) => it.event_id)).toEqual([events[0].eventId]);
  expect(await readStream(redis, STREAM)).toEqual([]);
  expect(totals(found)).toMatchObject({ lost: 1, restored: 1, refused: 0 });
});
