/**
 * A backlog in which one event of fifty is refused, retried and dead-lettered; and one without such. What is
 * behind a poisonous event in its own aggregate waits for its dead letter, and is delivered then.
 */
import type { Contender } from '../contender.ts';
import { NOTHING_FRESH, NOTHING_LIVE, openRelay, type Relay } from '../contenders/relay.ts';
import { inTurns, rateFigures, type Scenario } from '../scenario.ts';

/** A string: appends to it are refused with WRONGTYPE. */
const POISONOUS_TOPIC = 'bench.no-stream';
const ONE_OF = 50;
const EVENTS_OF_EACH = 4;

export const POISON: Scenario = {
  name: 'poison',
  describe: 'one event of fifty refused, retried once and dead-lettered',
  minutes: 2,
  async run(context) {
    const { options, undo, progress } = context;
    const { events = options.quick ? 3_000 : 20_000 } = options;
    progress.now('starting servers and pods');
    const servers = await context.open();
    await servers.redis.set(POISONOUS_TOPIC, 'a string');
    const env = { RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_RETRY_BASE_DELAY: '1' };
    const without = await openRelay(servers, { name: 'without', env }, undo);
    const poisoned = poison(await openRelay(servers, { name: 'with poison', env }, undo));
    const workload = { events, aggregates: Math.ceil(events / EVENTS_OF_EACH) };
    const drained = await inTurns(context, [
      { contender: without, workload },
      { contender: poisoned, workload },
    ]);
    return {
      about: `${events} events of ${workload.aggregates} aggregates; the rate is that of healthy ones, until all aggregates without a poisonous one are done`,
      figures: rateFigures(drained, [['with poison', 'without']]),
      verified:
        'every healthy event once and in order, every poisonous one dead with one dead letter, in every run',
      notes: [],
    };
  },
};

function poison(relay: Relay): Contender {
  const { pool, name, describe, stream } = relay;
  return {
    ...{ name, describe },
    async drain({ events, aggregates }) {
      await relay.clear();
      await pool.query(
        // The first event of its aggregate, or a later one.
        `INSERT INTO identity.outbox (event_type, aggregate_id, payload, topic)
         SELECT 'UserCreated', md5('' || i % $5::int)::uuid, jsonb_build_object(
           'user_id', gen_random_uuid(), 'tenant_id', '11111111-1111-1111-1111-111111111111',
           'email', 'user' || i || '@example.com', 'display_name', 'User ' || i, 'status', 'active',
           'created_at', '2026-01-01T00:00:00Z'), CASE WHEN i % $2::int = 0 THEN $3 ELSE $4 END
         FROM generate_series(1, $1::int) i`,
        [events, ONE_OF, POISONOUS_TOPIC, stream, aggregates],
      );
      const startedAt = await relay.now();
      await relay.until(`${NOTHING_FRESH} AND ${NOTHING_LIVE}`);
      const { rows } = await pool.query<{ healthy: number; dead: number; seconds: number }>(
        `WITH poisoned AS (SELECT DISTINCT aggregate_id FROM identity.outbox WHERE topic = $2),
              others AS (SELECT max(published_at) AS ended FROM identity.outbox
                          WHERE aggregate_id NOT IN (SELECT aggregate_id FROM poisoned))
         SELECT count(*) FILTER (WHERE published AND published_at <= ended)::int AS healthy,
                count(dead_lettered_at)::int AS dead,
                extract(epoch FROM max(ended) - $1::timestamptz)::float8 AS seconds FROM identity.outbox, others`,
        [startedAt, POISONOUS_TOPIC],
      );
      const [{ healthy = 0, dead = 0, seconds = 0 } = {}] = rows;
      const poisonous = Math.floor(events / ONE_OF);
      if (dead !== poisonous) throw new Error(`${dead} events are dead instead of ${poisonous}`);
      await relay.audit();
      return { events: healthy, seconds };
    },
  };
}
