import type { SyntaxNode } from '@lezer/common';
import { parser } from '@prometheus-io/lezer-promql';

/** One selector of a query: the metrics that it may mean, and the labels that it asks for. */
export type Selector = Readonly<{ metric: RegExp; labels: string[] }>;

/** The selectors of a query, with the labels by which the query as a whole groups or joins. */
export function selectorsOf(query: string): { selectors: Selector[]; grouping: string[] } {
  // Grafana's variables are not PromQL.
  const text = query.replaceAll('$__rate_interval', '1m');
  const selectors: Selector[] = [];
  const grouping: string[] = [];
  const said = (node: SyntaxNode) => text.slice(node.from, node.to);
  parser.parse(text).iterate({
    enter({ node, type }) {
      if (type.isError) throw new Error(`cannot be parsed at ${text.slice(node.from)}: ${text}`);
      if (type.name === 'VectorSelector') selectors.push(selectorOf(node));
      if (type.name === 'GroupingLabels') grouping.push(...node.getChildren('LabelName').map(said));
    },
  });

  function selectorOf(node: SyntaxNode): Selector {
    const name = node.getChild('Identifier');
    let metric = name === null ? undefined : new RegExp(`^${said(name)}$`);
    const labels: string[] = [];
    const matchers = node.getChild('LabelMatchers');
    for (const matcher of matchers?.getChildren('UnquotedLabelMatcher') ?? []) {
      const label = said(matcher.getChild('LabelName') as SyntaxNode);
      if (label !== '__name__') labels.push(label);
      else metric = new RegExp(`^(?:${said(matcher.getChild('StringLiteral') as SyntaxNode).slice(1, -1)})$`);
    }
    if (metric === undefined) throw new Error(`a selector names no metric: ${said(node)}`);
    return { metric, labels };
  }
  return { selectors, grouping };
}

/** Families of the exposition format, by name: their type, and the labels of their samples. */
export type Families = ReadonlyMap<
  string,
  Readonly<{ type: string; labels: ReadonlySet<string>; samples: Sample[] }>
>;
export type Sample = Readonly<{ name: string; labels: Readonly<Record<string, string>>; value: number }>;

export function familiesOf(exposition: string): Families {
  const families = new Map<string, { type: string; labels: Set<string>; samples: Sample[] }>();
  let current: { type: string; labels: Set<string>; samples: Sample[] } | undefined;
  for (const line of exposition.split('\n')) {
    const [, family, type] = /^# TYPE (\S+) (\S+)$/.exec(line) ?? [];
    if (family !== undefined) {
      current = { type: type as string, labels: new Set(), samples: [] };
      families.set(family, current);
      continue;
    }
    const [, name, inBraces = '', value] = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/.exec(line) ?? [];
    if (name === undefined || current === undefined) continue;
    const labels: Record<string, string> = {};
    for (const [, label, text] of inBraces.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label as string] = text as string;
      current.labels.add(label as string);
    }
    current.samples.push({ name, labels, value: Number(value) });
  }
  return families;
}

/** The names under which samples come, each with its labels. */
export function seriesOf(families: Families): Map<string, Set<string>> {
  const series = new Map<string, Set<string>>();
  for (const { samples } of families.values()) {
    for (const { name, labels } of samples) {
      const known = series.get(name) ?? new Set();
      for (const label of Object.keys(labels)) known.add(label);
      series.set(name, known);
    }
  }
  return series;
}

/** The value of the one sample with that name and at least these labels. */
export function valueIn(
  families: Families,
  name: string,
  labels: Readonly<Record<string, string>> = {},
): number {
  const found = [...families.values()]
    .flatMap(({ samples }) => samples)
    .filter(
      (it) => it.name === name && Object.entries(labels).every(([key, text]) => it.labels[key] === text),
    );
  if (found.length !== 1) throw new Error(`${found.length} samples of ${name} ${JSON.stringify(labels)}`);
  return (found[0] as Sample).value;
}
