import { fileURLToPath } from 'node:url';
import { configDefaults, defineConfig } from 'vitest/config';
import { BaseSequencer, type TestSpecification } from 'vitest/node';

/**
 * What takes its time, `npm run test:slow`: outages that last, clusters, other programs, large tables, random walks. The
 * others, `npm test`, take less than five minutes on two cores.
 */
const SLOW = [
  'test/{chaos,model,package}/*.test.ts',
  'test/docs/{consumers,nestjs}.test.ts',
  'test/flow/!(configuration|costs|health|killing|metrics|order|payload|redis-loss|retries|status|stopping|wakeup).test.ts',
  'test/demo/main.test.ts',
  'test/outbox/held-snapshot.test.ts',
  'test/support/cleanup.test.ts',
];

const HANGS_AFTER_MS = 900_000;

/** What takes a minute or more, the longest first: begun last, one of them would keep a core busy while others idle. */
const LONGEST = [
  ...[
    'consumer',
    'alerts',
    'network',
    'image',
    'crashing',
    'order-model',
    'refusals',
    'forgetting',
    'retries',
  ],
  ...['rollback', 'chaos', 'main', 'redis-loss', 'servers', 'dead-letters', 'ownership', 'two-servers'],
  ...[
    'terminal',
    'taken-away',
    'verify',
    'outages',
    'crash-windows',
    'held-snapshot',
    'least-privilege',
    'browser',
  ],
].map((name) => `/${name}.test.ts`);

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const sorted = await super.sort(files);
    const rank = ({ moduleId }: TestSpecification) => {
      const at = LONGEST.findIndex((name) => moduleId.endsWith(name));
      return at < 0 ? LONGEST.length : at;
    };
    return sorted.toSorted((a, b) => rank(a) - rank(b));
  }
}

/** Without a mode: all. */
export default defineConfig(({ mode }) => ({
  root: fileURLToPath(new URL('..', import.meta.url)),
  test: {
    include: mode === 'slow' ? SLOW : ['test/**/*.test.ts'],
    exclude: [...configDefaults.exclude, ...(mode === 'quick' ? SLOW : [])],
    globalSetup: ['test/support/global-setup.ts'],
    setupFiles: ['test/support/each-file.ts'],
    sequence: { sequencer: LongestFirst },
    pool: 'forks',
    // A worker of the quick part loads each module once, not once for each file, which saves a fifth of the CPU time.
    // Slow files gain little, since they run for minutes, and keep their isolation.
    isolate: mode !== 'quick',
    // More than the two cores of a small CI machine: the tests wait for servers, too. The slow ones keep them busy.
    maxWorkers: 4,
    // Of the tests in one file that ask for it.
    maxConcurrency: 3,
    // A test ends by its conditions (test/support/wait.ts); these end one that hangs.
    testTimeout: HANGS_AFTER_MS,
    hookTimeout: HANGS_AFTER_MS,
    // A machine that is shared may starve a pod for seconds; twice in a row is a finding.
    retry: process.env.CI ? 1 : 0,
  },
}));
