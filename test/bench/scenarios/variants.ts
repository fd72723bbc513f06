/** The relay against itself: the same backlog, drained in turns by pods that differ in one thing. */
import type { Contender } from '../contender.ts';
import { openNoop } from '../contenders/noop.ts';
import { CLI_BEFORE, openRelay, type Relay } from '../contenders/relay.ts';
import { inTurns, ONCE_IN_ORDER, rateFigures, type Scenario } from '../scenario.ts';
import type { Workload } from '../workload.ts';

type Variant = Readonly<{
  name: string;
  env?: Readonly<Record<string, string>>;
  pods?: number;
  workload?: Partial<Workload>;
  /** What it is compared with; left out: the first, or the no-op queue alone. */
  against?: string;
}>;

function variants(of: {
  name: string;
  describe: string;
  minutes: number;
  /** The first is what the others are compared with. */
  list: readonly Variant[];
  /** Beside a no-op queue, and the build of before if one is given. */
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
      const relays = new Map<string, Relay>();
      for (const variant of of.list) {
        const { name, workload: ofVariant } = variant;
        const workload = { events, aggregates: events, ...ofVariant };
        entries.push({ contender: { ...(await relayOf(variant)), name }, workload });
        if (of.besideNoop && CLI_BEFORE !== undefined) {
          const relay = await relayOf(variant, CLI_BEFORE);
          entries.push({ contender: { ...relay, name: before(name) }, workload });
        }
      }
      const [firstRelay] = relays.values();
      if (of.besideNoop && firstRelay) {
        const sample = await firstRelay.sampleJob({ events, aggregates: events });
        entries.push({
          contender: await openNoop(servers, sample, undo),
          // Faster, so more of them for a time that can be measured.
          workload: { events: 2 * events, aggregates: events },
        });
      }
      const drained = await inTurns(context, entries);
      const first = of.besideNoop ? undefined : of.list[0]?.name;
      const ratios = [
        // Those whose sides were not both measured are left out.
        ...of.list.flatMap(({ name }) => [[name, 'no-op queue'] as const, [name, before(name)] as const]),
        ...of.list
          .slice(1)
          .flatMap(({ name, against = first }) => (against ? [[name, against] as const] : [])),
      ];
      return {
        about: `${events} events`,
        figures: rateFigures(drained, ratios),
        verified: of.list.some((it) => it.env?.RELAY_ORDERING === 'none')
          ? 'every event once, in every run; in the order of its aggregate where that is promised'
          : ONCE_IN_ORDER,
        notes: of.besideNoop && CLI_BEFORE !== undefined ? [`relay before: ${CLI_BEFORE}`] : [],
      };

      /** Variants of different workloads have the same pods: each pod that idles takes CPU from those that are measured. */
      async function relayOf({ env = {}, pods = 1 }: Variant, cli?: string): Promise<Relay> {
        const key = JSON.stringify([env, pods, cli]);
        const name = `relay ${relays.size + 1}`;
        const relay = relays.get(key) ?? (await openRelay(servers, { name, env, pods, cli }, undo));
        relays.set(key, relay);
        return relay;
      }
    },
  };
}

const before = (name: string) => `relay before, ${name}`;

export const HOT = variants({
  name: 'hot',
  describe: 'all events of 10 aggregates, or of one, by one pod and by two',
  minutes: 3,
  events: 10_000,
  besideNoop: true,
  list: [
    { name: '10 aggregates', workload: { aggregates: 10 } },
    { name: '1 aggregate', workload: { aggregates: 1 } },
    { name: '10 aggregates, 2 pods', pods: 2, workload: { aggregates: 10 }, against: '10 aggregates' },
    { name: '1 aggregate, 2 pods', pods: 2, workload: { aggregates: 1 }, against: '1 aggregate' },
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
