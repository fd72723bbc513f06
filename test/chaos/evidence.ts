import { inspect } from 'node:util';
import { withDeadline } from '../../src/lifecycle.ts';
import { DLQ, STREAM, type World } from './world.ts';

const LOOK_DEADLINE_MS = 10_000;
const ACTIVE_JOBS = 20;
const TRACED_EVENTS = 50;

/** What PostgreSQL and Redis see at this moment: taken when flow has not resumed, for whoever has to find out why. */
export async function takeEvidence(world: World): Promise<string> {
  const { sql, queues } = world;
  const looks = {
    rows: () =>
      sql(`SELECT CASE WHEN next_attempt_at IS NULL THEN 'fresh' WHEN next_attempt_at = 'infinity' THEN 'parked'
                       WHEN next_attempt_at > now() THEN 'leased' ELSE 'expired' END AS state, count(*)
             FROM identity.outbox WHERE NOT published AND dead_lettered_at IS NULL GROUP BY 1`),
    sessions: () =>
      sql(`SELECT pid, client_port, state, wait_event, now() - xact_start AS transaction, now() - state_change AS since,
                  left(regexp_replace(query, '\\s+', ' ', 'g'), 100) AS query
             FROM pg_stat_activity WHERE usename = 'relay' ORDER BY xact_start`),
    locks: () =>
      sql(
        `SELECT pid, relation::regclass, mode, granted FROM pg_locks WHERE relation::regclass::text LIKE '%relay_%_lock'`,
      ),
    claimQueue: () => queues.claim.getJobCounts(),
    activeClaims: async () =>
      (await queues.claim.getActive(0, ACTIVE_JOBS)).map((job) => ({
        id: job?.id,
        name: job?.name,
        beganAt: job?.processedOn && new Date(job.processedOn),
        by: job?.processedBy,
      })),
    publishQueue: () => queues.publish.getJobCounts(),
  };
  const seen = await Promise.all(
    Object.entries(looks).map(async ([what, look]) => {
      const answer = await withDeadline<unknown>(LOOK_DEADLINE_MS, look()).catch(
        (error: Error) => error.message,
      );
      return `${what}: ${inspect(answer, { depth: 4, breakLength: 200, maxArrayLength: 100 })}`;
    }),
  );
  return `${new Date().toISOString()}\n${seen.join('\n')}`;
}

/** Row, entries and dead letters of some events: the id of an entry tells when it was appended. */
export async function traceEvents({ sql, client }: World, eventIds: ReadonlySet<string>): Promise<unknown[]> {
  const rows = await sql<Record<string, unknown>>(
    'SELECT * FROM identity.outbox WHERE event_id = ANY($1::uuid[])',
    [[...eventIds].slice(0, TRACED_EVENTS)],
  );
  const streams = new Set([
    STREAM,
    DLQ,
    ...rows.flatMap(({ topic }) => (typeof topic === 'string' ? topic : [])),
  ]);
  const entries: { stream: string; entry: string; fields: string[] }[] = [];
  for (const stream of streams) {
    if ((await client.type(stream)) !== 'stream') continue;
    for (const [entry, fields] of await client.xrange(stream, '-', '+'))
      entries.push({ stream, entry, fields });
  }
  return rows.map((row) => ({
    row,
    entries: entries.filter(({ fields }) => fields.includes(String(row.event_id))),
  }));
}
