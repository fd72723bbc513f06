/** The tables of docs/benchmarks.md say what the results say that are kept beside it. */
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, inject, test } from 'vitest';
import type { Bench } from '../bench/report.ts';
import { median } from '../bench/scenario.ts';

const read = (path: string) => readFile(join(inject('root'), path), 'utf8');
const results = async (name: string): Promise<Bench> => JSON.parse(await read(`test/bench/results/${name}`));

const PAGE = await read('docs/benchmarks.md');
const BENCHES = [await results('bench.json'), await results('bench-node-24.json')];

type Table = Readonly<{
  /** The first cell of its head. */
  head: string;
  /** How a row begins, and its figures, each behind its scenario: on Node.js 20, and then the same on 24. */
  rows: Readonly<Record<string, readonly (string | null)[]>>;
}>;

const against = (name: string) => [`drain: ${name}`, `drain: relay / ${name}`];
const hot = (name: string) => [`hot: ${name}`, `hot: ${name} / no-op queue`];
const idle = (rate: number) => [`idle: ${rate} events/s, p50`, `idle: ${rate} events/s, p99`];
const steady = (percent: number) =>
  ['p50', 'p99', 'all cores busy'].map((it) => `steady: ${percent} % of the drain rate, ${it}`);

const TABLES: readonly Table[] = [
  {
    head: '20,000 events of as many aggregates',
    rows: {
      'The relay': ['drain: relay', null],
      'A BullMQ queue': against('no-op queue'),
      'A simple relay': against('card'),
      'Direct poller': against('direct poller'),
      '`graphile-worker`, in order': against('graphile-worker, in order'),
      '`graphile-worker`, no order': against('graphile-worker, no order'),
      '`pg-transactional-outbox`': against('pg-transactional-outbox, as documented'),
      'Pipelined XADD': against('raw XADD'),
    },
  },
  {
    head: '10,000 events of few aggregates, in order',
    rows: {
      'ten, one pod': hot('10 aggregates'),
      'ten, two pods': hot('10 aggregates, 2 pods'),
      'one, one pod': hot('1 aggregate'),
      'one, two pods': hot('1 aggregate, 2 pods'),
    },
  },
  {
    head: 'From commit to stream entry, in ms',
    rows: { '20 events/s': idle(20), '100 events/s': idle(100) },
  },
  {
    head: 'The same under steady load',
    rows: { 'a quarter': steady(25), half: steady(50), 'three quarters': steady(75) },
  },
  {
    head: 'Ratio, unless it says more',
    rows: {
      'two pods': ['pods: 2 pods / 1 pod'],
      'three pods': ['pods: 3 pods / 1 pod'],
      'without order, as many': ['ordering: unordered / ordered'],
      'without order, 100': ['ordering: unordered, 100 aggregates / ordered, 100 aggregates'],
      'payloads of 1 kB': ['payload: 1 kB / 0.2 kB'],
      'payloads of 10 kB': ['payload: 10 kB / 0.2 kB'],
      '`RELAY_VALIDATION=strict`': ['validation: strict / off'],
      'one event of fifty': ['poison: with poison / without'],
      'other aggregates': ['blocked: beside / without'],
      '1,000,000 rows waiting': ['backlog: last tenth / first tenth of 1,000,000'],
      'memory of the pod': ['backlog: pod, resident, at most, 1,000,000 rows'],
      '1,000,000 published rows': ['growth: 1,000,000 published rows / 0 published rows'],
      '10,000,000 published rows': ['growth: 10,000,000 published rows / 0 published rows'],
      'p99 at 300 events/s': ['retention: p99, during / before and after'],
      'a pod at work': ['start-up: pod at work / import'],
    },
  },
];

const short = (value: number): string =>
  value >= 99.5
    ? Math.round(value).toLocaleString('en')
    : value.toPrecision(value >= 1 && value < 9.995 ? 3 : 2);

/** The median, and in brackets the least and the most where they differ from it. */
function cellOf({ results }: Bench, name: string | null): string {
  if (name === null) return '';
  const [found] = results.flatMap(({ scenario, figures }) =>
    figures.filter((it) => `${scenario}: ${it.name}` === name),
  );
  if (found === undefined) return `there is no figure "${name}"`;
  const { values } = found;
  const [least, most] = [short(Math.min(...values)), short(Math.max(...values))];
  return least === most ? least : `${short(median(values))} (${least}–${most})`;
}

const cells = (line: string) =>
  line
    .split('|')
    .slice(1, -1)
    .map((it) => it.trim());

test.each(TABLES)('$head', ({ head, rows }) => {
  const lines = PAGE.split('\n');
  const start = lines.findIndex((line) => line.startsWith(`| ${head} |`));
  expect(start).toBeGreaterThan(0);
  const length = lines.slice(start).findIndex((line) => !line.startsWith('|'));
  const written = lines.slice(start + 2, start + length).map(cells);
  const labels = written.map(([label = '']) => label);
  const measured = Object.entries(rows).map(([label, names]) => [
    labels.find((it) => it.startsWith(label)) ?? label,
    ...BENCHES.flatMap((bench) => names.map((name) => cellOf(bench, name))),
  ]);
  expect(written).toEqual(measured);
});

test.each([0, 1])('the page names commit and Node.js of the results (%i)', (index) => {
  const { versions } = BENCHES[index] as Bench;
  expect(PAGE).toContain(/\((\w+)\)/.exec(versions.relay ?? '')?.[1]);
  expect(PAGE).toContain(versions.node?.slice(1));
});
