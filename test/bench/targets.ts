/** What the relay is to reach, on two cores that it shares with the servers. */
import { median, type ScenarioResult } from './scenario.ts';

type Target = Readonly<{
  what: string;
  target: string;
  scenario: string;
  /** Of the scenario; the median of its rounds counts. */
  figure: string;
  isMet: (value: number) => boolean;
}>;

const atLeast = (least: number) => (value: number) => value >= least;
const atMost = (most: number) => (value: number) => value <= most;

export const TARGETS: readonly Target[] = [
  {
    ...{ what: 'drain, one pod, ordered, against the no-op BullMQ queue', target: '≥ 0.5' },
    ...{ scenario: 'drain', figure: 'relay / no-op queue', isMet: atLeast(0.5) },
  },
  {
    ...{ what: 'drain, against the direct poller without queue, order, retries', target: '≥ 0.45' },
    ...{ scenario: 'drain', figure: 'relay / direct poller', isMet: atLeast(0.45) },
  },
  {
    ...{ what: 'drain, against a job for each event as written in an afternoon', target: '≥ 2' },
    ...{ scenario: 'drain', figure: 'relay / card', isMet: atLeast(2) },
  },
  {
    ...{ what: 'drain, against pg-transactional-outbox as documented', target: '≥ 25' },
    ...{ scenario: 'drain', figure: 'relay / pg-transactional-outbox, as documented', isMet: atLeast(25) },
  },
  {
    ...{ what: 'drain, against pg-transactional-outbox, tuned', target: '≥ 25' },
    ...{ scenario: 'drain', figure: 'relay / pg-transactional-outbox, tuned', isMet: atLeast(25) },
  },
  {
    ...{ what: "CPU of a pod against that of the no-op queue's process", target: '≤ 1.7' },
    ...{ scenario: 'drain', figure: "CPU of a pod / CPU of the no-op queue's process", isMet: atMost(1.7) },
  },
  {
    ...{ what: 'ten hot aggregates, one pod, against the no-op queue', target: '≥ 0.4' },
    ...{ scenario: 'hot', figure: '10 aggregates / no-op queue', isMet: atLeast(0.4) },
  },
  {
    ...{ what: 'ten hot aggregates, two pods, against the no-op queue', target: '≥ 0.3' },
    ...{ scenario: 'hot', figure: '10 aggregates, 2 pods / no-op queue', isMet: atLeast(0.3) },
  },
  {
    ...{ what: 'one hot aggregate, one pod, against the no-op queue', target: '≥ 0.17' },
    ...{ scenario: 'hot', figure: '1 aggregate / no-op queue', isMet: atLeast(0.17) },
  },
  {
    ...{ what: 'one hot aggregate, two pods, against the no-op queue', target: '≥ 0.1' },
    ...{ scenario: 'hot', figure: '1 aggregate, 2 pods / no-op queue', isMet: atLeast(0.1) },
  },
  {
    ...{ what: '100 events/s, commit to stream entry, p50', target: '≤ 4 ms' },
    ...{ scenario: 'idle', figure: '100 events/s, p50', isMet: atMost(4) },
  },
  {
    ...{ what: '100 events/s, commit to stream entry, p99', target: '≤ 10 ms' },
    ...{ scenario: 'idle', figure: '100 events/s, p99', isMet: atMost(10) },
  },
  {
    ...{ what: 'steady at half the drain rate, p99', target: '≤ 30 ms' },
    ...{ scenario: 'steady', figure: '50 % of the drain rate, p99', isMet: atMost(30) },
  },
  {
    ...{ what: 'drain rate with 10 million published rows, against none', target: '≥ 0.95' },
    ...{ scenario: 'growth', figure: '10,000,000 published rows / 0 published rows', isMet: atLeast(0.95) },
  },
  {
    ...{ what: 'the last 10 % of a backlog of 1,000,000 against the first 10 %', target: '≥ 0.9' },
    ...{ scenario: 'backlog', figure: 'last tenth / first tenth of 1,000,000', isMet: atLeast(0.9) },
  },
  {
    ...{ what: 'row writes per event', target: '2' },
    ...{ scenario: 'costs', figure: 'row writes', isMet: atMost(2.005) },
  },
  {
    ...{ what: 'SQL statements per event under load', target: '≤ 0.05' },
    ...{ scenario: 'costs', figure: 'SQL statements', isMet: atMost(0.05) },
  },
  {
    ...{ what: 'Redis round trips per event under load', target: '≤ 3' },
    ...{ scenario: 'costs', figure: 'Redis round trips', isMet: atMost(3) },
  },
  {
    ...{ what: 'Redis calls per event under load, pipelined', target: '≤ 3' },
    ...{ scenario: 'costs', figure: 'Redis calls', isMet: atMost(3) },
  },
  {
    ...{ what: 'resident memory of a pod, 1,000,000 rows waiting', target: '≤ 140 MiB' },
    ...{ scenario: 'backlog', figure: 'pod, resident, at most, 1,000,000 rows', isMet: atMost(140) },
  },
  {
    ...{ what: '2 pods against 1', target: '≥ 0.95' },
    ...{ scenario: 'pods', figure: '2 pods / 1 pod', isMet: atLeast(0.95) },
  },
  {
    ...{ what: 'start of a pod, against an import of BullMQ, pg and fastify', target: '≤ 1.5' },
    ...{ scenario: 'start-up', figure: 'pod at work / import', isMet: atMost(1.5) },
  },
];

export type RequirementResult = Readonly<{
  what: string;
  target: string;
  /** Undefined where its scenario was not run. */
  value: number | undefined;
  values: readonly number[];
  result: 'met' | 'not met' | 'not measured';
}>;

export function judge(results: readonly ScenarioResult[]): RequirementResult[] {
  return TARGETS.map(({ what, target, scenario, figure, isMet }) => {
    const result = results.find((it) => it.scenario === scenario);
    const values = result?.figures.find((it) => it.name === figure)?.values ?? [];
    if (values.length === 0) return { what, target, value: undefined, values, result: 'not measured' };
    const value = median(values);
    return { what, target, value, values, result: isMet(value) ? 'met' : 'not met' };
  });
}
