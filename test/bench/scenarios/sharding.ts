/**
 * How many relays a load takes, simulated: events of aggregates of very different popularity are dealt out to relays by
 * a hash of their tenant, as a team would split its database, and the fullest relay decides what all of them carry.
 */
import { createHash } from 'node:crypto';
import { createRandom } from '../../chaos/random.ts';
import type { Figure, Scenario } from '../scenario.ts';

/** What one event costs, as measured by `drain`: CPU in microseconds. Replace it with what your machine says. */
const COST_MICROS = { pod: 184, redis: 104, postgres: 64 } as const;
/** Cores that each may use. A pod and a Redis have one; so have we given a table, though PostgreSQL would take more. */
const CORES = { pod: 1, redis: 1, postgres: 1 } as const;
/** Beyond this share of a core a queue grows faster than it gets served in bursts. */
const UTILISATION = 0.7;
/** The n-th has 1/√n as many events as the first, which has half a per cent of all. */
const TENANTS = 10_000;
const EVENTS = 200_000;

/** Events per second that one relay carries when it has as many pods as it can use: its Redis or its table decides. */
const ONE_RELAY =
  UTILISATION *
  Math.min((CORES.redis * 1e6) / COST_MICROS.redis, (CORES.postgres * 1e6) / COST_MICROS.postgres);
const PODS_PER_RELAY = Math.ceil(ONE_RELAY / ((UTILISATION * CORES.pod * 1e6) / COST_MICROS.pod));

const GOALS = [1, 10, 100] as const;

export const SHARDING: Scenario = {
  name: 'sharding',
  describe: 'simulated: relays for ten and a hundred times the load of one',
  minutes: 0.1,
  async run() {
    const counts = tenantsOf(EVENTS);
    const figures: Figure[] = [
      { name: 'one relay carries', unit: 'events/s', values: [ONE_RELAY] },
      { name: 'pods of one relay', unit: 'pods', values: [PODS_PER_RELAY] },
    ];
    for (const goal of GOALS) {
      const relays = relaysFor(goal, counts);
      figures.push(
        { name: `${goal} x: relays`, unit: 'relays', values: [relays] },
        {
          name: `${goal} x: the fullest relay, against the average`,
          unit: 'ratio',
          values: [fullest(relays, counts) * relays],
        },
      );
    }
    return {
      about:
        `${EVENTS.toLocaleString('en')} events of ${TENANTS.toLocaleString('en')} tenants, the n-th with 1/√n of the first one's; ` +
        `a pod ${COST_MICROS.pod}, Redis ${COST_MICROS.redis}, PostgreSQL ${COST_MICROS.postgres} µs per event, used to ${UTILISATION * 100} %`,
      figures,
      verified: 'nothing: this is arithmetic and dice, no relay runs',
      notes: ['a tenant is never split, so the largest one bounds how far relays help'],
    };
  },
};

/** Events of each tenant, dealt out at random by their popularity. */
function tenantsOf(events: number): Map<string, number> {
  const random = createRandom(1);
  const upTo: number[] = [];
  for (let n = 1; n <= TENANTS; n++) upTo.push((upTo.at(-1) ?? 0) + 1 / Math.sqrt(n));
  const counts = new Map<string, number>();
  for (let i = 0; i < events; i++) {
    const drawn = random() * (upTo.at(-1) as number);
    let [low, high] = [0, TENANTS - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if ((upTo[middle] as number) < drawn) low = middle + 1;
      else high = middle;
    }
    counts.set(`tenant ${low}`, (counts.get(`tenant ${low}`) ?? 0) + 1);
  }
  return counts;
}

/** The fewest relays that carry `times` as much as one, none of them too much. */
function relaysFor(times: number, counts: ReadonlyMap<string, number>): number {
  for (let relays = times; ; relays += Math.max(1, Math.floor(times / 20))) {
    const load = times * ONE_RELAY * fullest(relays, counts);
    if (load <= ONE_RELAY * 1.0001) return relays;
    // The largest tenant alone is too much for one relay: more of them do not help.
    if (relays > 100 * times) return Number.POSITIVE_INFINITY;
  }
}

/** Share of all events that the fullest of so many relays gets. */
function fullest(relays: number, counts: ReadonlyMap<string, number>): number {
  const loads = new Array<number>(relays).fill(0);
  for (const [tenant, events] of counts) {
    const relay = createHash('sha1').update(tenant).digest().readUInt32BE(0) % relays;
    loads[relay] = (loads[relay] as number) + events;
  }
  return Math.max(...loads) / EVENTS;
}
