/** How soon a pod is at work, beside what Node.js takes by itself to import what the relay is built on. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { startPod } from '../../demo/pod.ts';
import { CLI, openRelay } from '../contenders/relay.ts';
import { median, type Scenario } from '../scenario.ts';
import { pause } from '../servers.ts';

const STARTS = 9;
const STARTS_QUICK = 3;
const DEADLINE_MS = 30_000;
const LIBRARIES = ['bullmq', 'pg', 'fastify'];
const IMPORT = LIBRARIES.map((it) => `await import('${it}');`).join(' ');

export const START_UP: Scenario = {
  name: 'start-up',
  describe:
    'from the start of the process until a pod is at work, beside an import of BullMQ, pg and fastify',
  minutes: 1,
  async run({ options, open, undo, progress }) {
    const starts = options.quick ? STARTS_QUICK : STARTS;
    progress.now('starting servers');
    const servers = await open();
    const { env } = await openRelay(servers, { name: 'relay', pods: 0 }, undo);
    const [ready, imported]: [number[], number[]] = [[], []];
    for (let run = 1; run <= options.runs; run++) {
      progress.now(`run ${run} of ${options.runs}`);
      const ofRun: [number[], number[]] = [[], []];
      for (let start = 1; start <= starts; start++) {
        ofRun[0].push(await startOnce());
        ofRun[1].push(await importOnce());
      }
      ready.push(median(ofRun[0]));
      imported.push(median(ofRun[1]));
    }
    return {
      about: `${starts} starts of a pod and ${starts} imports, in turns; the median of them is the value of a run`,
      figures: [
        { name: 'pod at work', unit: 'ms', values: ready },
        { name: 'import', unit: 'ms', values: imported },
        {
          ...{ name: 'pod at work / import', unit: 'ratio' },
          values: ready.map((ms, i) => ms / (imported[i] as number)),
        },
      ],
      verified: 'each pod said that it had started, and ended with exit code 0',
      notes: [`import: ${LIBRARIES.join(', ')}, by a process of its own`],
    };

    async function startOnce(): Promise<number> {
      const startedAt = performance.now();
      const pod = await startPod({ cli: CLI, env: { ...env, RELAY_LOG_LEVEL: 'info' } });
      undo.push(() => pod.kill('SIGKILL'));
      while (!pod.lines.some((line) => line.includes('relay started'))) {
        if (performance.now() > startedAt + DEADLINE_MS)
          throw new Error(`no start:\n${pod.lines.join('\n')}`);
        await pause(1);
      }
      const took = performance.now() - startedAt;
      const { code } = await pod.kill();
      if (code !== 0) throw new Error(`a pod ended with ${code}:\n${pod.lines.join('\n')}`);
      return took;
    }

    async function importOnce(): Promise<number> {
      const startedAt = performance.now();
      await promisify(execFile)(process.execPath, ['--input-type=module', '--eval', IMPORT], {
        cwd: import.meta.dirname,
      });
      return performance.now() - startedAt;
    }
  },
};
