import { execFile } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { Deployment } from 'kubernetes-types/apps/v1.js';
import type { Job } from 'kubernetes-types/batch/v1.js';
import type { Container, PodSpec } from 'kubernetes-types/core/v1.js';
import { expect, inject, test } from 'vitest';
import { parseAllDocuments } from 'yaml';
import { VARIABLES } from '../../src/config/config.ts';
import { compile, sampleProject } from '../support/samples.ts';

type Manifest = Readonly<{ apiVersion: string; kind: string; metadata: { name: string } }>;

const root = inject('root');
const read = (path: string) => readFileSync(join(root, path), 'utf8');
const manifests: Manifest[] = parseAllDocuments(read('docs/deployment/kubernetes.yaml')).map((document) => {
  expect(document.errors).toEqual([]);
  return document.toJS();
});

function manifest<T>(kind: string): T {
  const found = manifests.filter((it) => it.kind === kind);
  expect(found, kind).toHaveLength(1);
  return found[0] as T;
}
const defaultOf = (name: string) => VARIABLES.find((variable) => variable.name === name)?.default ?? '';
const deployment = manifest<Deployment>('Deployment');
const job = manifest<Job>('Job');
const podOf = ({ spec }: Deployment | Job) => spec?.template.spec as PodSpec;
const containerOf = (owner: Deployment | Job) => podOf(owner).containers[0] as Container;

/** What the compiler says when each object is compared with the types made of Kubernetes' own OpenAPI description. */
async function problemsOf(objects: readonly Manifest[]): Promise<string> {
  const folder = await sampleProject(`manifests-${objects.length}`);
  const lines = objects.map(({ apiVersion, kind, ...rest }, i) => {
    const from = apiVersion.includes('/') ? apiVersion : `core/${apiVersion}`;
    const object = JSON.stringify({ apiVersion, kind, ...rest });
    return `import type { ${kind} as Kind${i} } from 'kubernetes-types/${from}';\nexport const it${i}: Kind${i} = ${object};`;
  });
  await writeFile(join(folder, 'manifests.ts'), lines.join('\n'));
  await writeFile(join(folder, 'package.json'), '{ "type": "module" }');
  const compilerOptions = {
    ...{ strict: true, noEmit: true, module: 'ESNext', moduleResolution: 'bundler', types: [] },
  };
  await writeFile(join(folder, 'tsconfig.json'), JSON.stringify({ compilerOptions, include: ['*.ts'] }));
  return compile(folder);
}

test('each manifest is what Kubernetes describes, field by field', async () => {
  expect(manifests.map(({ kind }) => kind)).toEqual([
    ...['ConfigMap', 'Job', 'Deployment', 'PodDisruptionBudget', 'Service'],
  ]);
  expect(await problemsOf(manifests)).toBe('');
  const misspelt = JSON.parse(JSON.stringify(manifests).replace('periodSeconds', 'periodSecond'));
  expect(await problemsOf([...misspelt, ...misspelt])).toContain('periodSecond');
});

test('each selector selects the pods', () => {
  const labels = deployment.spec?.template.metadata?.labels;
  const selectors = [
    deployment.spec?.selector.matchLabels,
    manifest<{ spec: { selector: { matchLabels: object } } }>('PodDisruptionBudget').spec.selector
      .matchLabels,
    manifest<{ spec: { selector: object } }>('Service').spec.selector,
    ...(podOf(deployment).topologySpreadConstraints ?? []).map((it) => it.labelSelector?.matchLabels),
  ];
  expect(selectors).toHaveLength(4);
  for (const selector of selectors) expect(labels).toMatchObject(selector as object);
});

test('what the pods run and are given are commands and variables of the relay', async () => {
  for (const container of [containerOf(deployment), containerOf(job)]) {
    const [command = ''] = container.args ?? [];
    const cli = [join(root, 'dist/cli.js'), command, '--help'];
    const { stdout } = await promisify(execFile)(process.execPath, cli);
    expect(stdout).toContain(`Usage: relay ${command}`);
  }
  const known = VARIABLES.map(({ name }) => name as string);
  const config = Object.keys(manifest<{ data: Record<string, string> }>('ConfigMap').data);
  const inSecrets = [...read('docs/deployment/kubernetes.yaml').matchAll(/--from-literal=(\w+)/g)];
  expect(inSecrets.length).toBeGreaterThan(2);
  for (const name of [...config, ...inSecrets.map(([, name]) => name)]) expect(known).toContain(name);
});

test('times, ports and the user fit the relay and its image', () => {
  const {
    startupProbe: startup,
    livenessProbe: liveness,
    readinessProbe: readiness,
    ports,
  } = containerOf(deployment);
  const pod = podOf(deployment);
  const startsWithinS = (startup?.periodSeconds ?? 0) * (startup?.failureThreshold ?? 0);
  expect(startsWithinS).toBeGreaterThan(Number(defaultOf('RELAY_STARTUP_TIMEOUT')));
  expect(pod.terminationGracePeriodSeconds).toBeGreaterThan(Number(defaultOf('RELAY_SHUTDOWN_TIMEOUT')));
  expect(ports?.map(({ containerPort }) => String(containerPort))).toEqual([defaultOf('RELAY_HTTP_PORT')]);
  const server = read('src/http/server.ts');
  for (const probe of [startup, liveness, readiness]) {
    expect(probe?.httpGet?.port).toBe(ports?.[0]?.name);
    expect(server).toContain(`'${probe?.httpGet?.path}'`);
  }
  const [, user] = /^USER (\d+)/m.exec(read('Dockerfile')) ?? [];
  for (const owner of [deployment, job]) {
    expect(String(podOf(owner).securityContext?.runAsUser)).toBe(user);
    expect(podOf(owner).enableServiceLinks).toBe(false);
  }
});
