/** The relay against itself: the same backlog, drained in turns by pods that differ in one thing. */
import type { Contender } from '../contender.ts';
import { openNoop } from '../contenders/noop.ts';
import { openRelay } from '../contenders/relay.ts';
import { inTurns, ONCE_IN_ORDER, rateFigures, type Scenario } from '../scenario.ts';
import type { Workload } from '../workload.ts';

type Variant = Readonly<{
  name: string;
  env?: Readonly<Record<string, string>>;
  pods?: number;
  workload?: Partial<Workload>;
  /** What it is compared with; left out: the first. */
  against?: string;
}>;

function variants(of: {
  name: string;
  describe: string;
  minutes: number;
  /** The first is what the others are compared with. */
  list: readonly Variant[];
  /** Beside a no-op queue of the same number of jobs. */
  besideNoop?: true;
  events?: number;
}): Scenario {
  return {
    ...{ name: of.name, describe: of.describe, minutes: of.minutes },
    async run(context) {
      const { options, undo, progress } = context;
      const { events = options.quick ? 3_000 : (of.events ?? 20_000) } = options;
      progress.now('starting servers and pods');
      const servers = await context.open();
      const entries: { contender: Contender; workload: Workload }[] = [];
      for (const { name, env = {}, pods = 1, workload = {} } of of.list) {
        const relay = await openRelay(servers, { name, env, pods }, undo);
        entries.push({ contender: relay, workload: { events, aggregates: events, ...workload } });
        if (of.besideNoop && entries.length === of.list.length) {
          const sample = await relay.sampleJob({ events, aggregates: events });
          entries.push({
            contender: await openNoop(servers, sample, undo),
            // Faster, so more of them for a time that can be measured.
            workload: { events: 4 * events, aggregates: events },
          });
        }
      }
      const [first = ''] = of.list.map(({ name }) => name);
      const drained = await inTurns(context, entries);
      const ratios = of.besideNoop
        ? of.list.map(({ name }) => [name, 'no-op queue'] as const)
        : of.list.slice(1).map(({ name, against = first }) => [name, against] as const);
      return {
        about: `${events} events`,
        figures: rateFigures(drained, ratios),
        verified: of.list.some((it) => it.env?.RELAY_ORDERING === 'none')
          ? 'every event once, in every run; in the order of its aggregate where that is promised'
          : ONCE_IN_ORDER,
        notes: [],
      };
    },
  };
}

export const HOT = variants({
  name: 'hot',
  describe: 'all events of 10 aggregates, or of one',
  minutes: 3,
  events: 5_000,
  besideNoop: true,
  list: [
    { name: '10 aggregates', workload: { aggregates: 10 } },
    { name: '1 aggregate', workload: { aggregates: 1 } },
  ],
});

export const PODS = variants({
  name: 'pods',
  describe: 'one, two and three pods',
  minutes: 3,
  list: [{ name: '1 pod' }, { name: '2 pods', pods: 2 }, { name: '3 pods', pods: 3 }],
});

export const PAYLOAD = variants({
  name: 'payload',
  describe: 'payloads of 0.2, 1 and 10 kB',
  minutes: 4,
  list: [
    { name: '0.2 kB', workload: { payloadBytes: 215 } },
    { name: '1 kB', workload: { payloadBytes: 1_000 } },
    { name: '10 kB', workload: { payloadBytes: 10_000 } },
  ],
});

export const VALIDATION = variants({
  name: 'validation',
  describe: 'validation off, warn and strict',
  minutes: 3,
  list: [
    { name: 'off', env: { RELAY_VALIDATION: 'off' } },
    { name: 'warn', env: { RELAY_VALIDATION: 'warn' } },
    { name: 'strict', env: { RELAY_VALIDATION: 'strict' } },
  ],
});

const FEW = 100;

export const ORDERING = variants({
  name: 'ordering',
  describe: 'with and without order, for many aggregates and for few',
  minutes: 3,
  list: [
    { name: 'ordered' },
    { name: 'unordered', env: { RELAY_ORDERING: 'none' } },
    { name: `ordered, ${FEW} aggregates`, workload: { aggregates: FEW } },
    {
      name: `unordered, ${FEW} aggregates`,
      ...{ env: { RELAY_ORDERING: 'none' }, workload: { aggregates: FEW } },
      against: `ordered, ${FEW} aggregates`,
    },
  ],
});
