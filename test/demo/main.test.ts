import { type ChildProcess, execFile, spawn } from 'node:child_process';
import { mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify, stripVTControlCharacters } from 'node:util';
import { Redis } from 'ioredis';
import { expect, inject, test, vi } from 'vitest';
import { atEndOfFile } from '../support/cleanup.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';
import { cleanEnvironment } from './pod.ts';

// Each run mostly waits for retries; several at once make up for it, at the price of a slower start.
vi.setConfig({ testTimeout: 180_000 });

type Demo = {
  child: ChildProcess;
  output(): string;
  /** The process has ended and its output is complete. */
  exited: Promise<{ code: number | null }>;
  /** Its folder for temporary files. */
  temporary: string;
};

let runs = 0;

async function startDemo(args: string[], env: Record<string, string> = {}): Promise<Demo> {
  const temporary = join(await folderOfFile(), `run-${++runs}`);
  await mkdir(temporary, { recursive: true });
  const child = spawn(
    process.execPath,
    ['--import', 'tsx', join(inject('root'), 'test/demo/main.ts'), ...args],
    {
      env: { ...cleanEnvironment(), TSX_DISABLE_CACHE: '1', TMPDIR: temporary, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    },
  );
  let output = '';
  for (const stream of [child.stdout, child.stderr])
    stream.on('data', (chunk: Buffer) => (output += chunk.toString()));
  const exited = new Promise<{ code: number | null }>((done) =>
    child.once('close', (code) => done({ code })),
  );
  atEndOfFile(async () => {
    child.kill('SIGKILL');
    await exited;
  });
  return { child, output: () => output, exited, temporary };
}

function says(demo: Demo, text: string | RegExp, timeoutMs = 100_000): Promise<RegExpMatchArray> {
  return waitFor(() => demo.output().match(text), { what: `the demo to say ${text}`, timeoutMs }).catch(
    (error: Error) => {
      throw new Error(`${error.message}; it said:\n${demo.output()}`);
    },
  );
}

/** Its servers and pods do not run any more, and its temporary files are gone. */
async function expectNothingLeft(demo: Demo): Promise<void> {
  const pids = [...demo.output().matchAll(/pid (\d+)/g)].map((match) => Number(match[1]));
  const isAlive = (pid: number): boolean => {
    try {
      process.kill(pid, 0);
      return true;
    } catch {
      return false;
    }
  };
  expect(pids.filter(isAlive)).toEqual([]);
  for (const [, port] of demo.output().matchAll(/ on port (\d+)/g)) {
    await expect(fetch(`http://127.0.0.1:${port}/`)).rejects.toThrow(
      expect.objectContaining({ cause: expect.objectContaining({ code: 'ECONNREFUSED' }) }),
    );
  }
  expect(await readdir(demo.temporary)).toEqual([]);
}

test.concurrent('a run with --events shows rows, entries, retries and the dead letter, and ends with exit code 0', async () => {
  const demo = await startDemo(['--events', '40', '--rate', '20'], { CI: '1' });

  expect(await demo.exited, demo.output()).toEqual({ code: 0 });

  const output = demo.output();
  expect(output.match(/row in .*#\d+/g)).toHaveLength(40);
  expect(output.match(/entry out .*#\d+ .* ms/g)).toHaveLength(39);
  expect(output).toMatch(/failed .*#8 .*attempt 1: next try in [01]\.\d s .*WRONGTYPE/);
  expect(output).toMatch(/failed .*#8 .*attempt 2: next try in [12]\.\d s .*WRONGTYPE/);
  expect(output).toMatch(/dead .*#8 .*given up after 3 attempts: now in identity\.user\.v1\.dlq/);
  expect(output).toMatch(/entry out .*#9 .* ms {2}waited for #8/);
  expect(output).toMatch(/events in +40 [\s\S]*entries out +39 [\s\S]*dead letters +1 [\s\S]*duplicates +0 /);
  expect(output).toMatch(
    /order violations +0 [\s\S]*lost +0 [\s\S]*latency p50 +[\d.]+ ms[\s\S]*latency p99 +[\d.]+ ms/,
  );
  expect(output).toMatch(/The promises held\. 40 events: 39 entries, 1 dead letter;\n +nothing lost/);
  expect(output.split('\n').filter((line) => line.length > 80)).toEqual([]);
  expect(output).not.toContain('in another terminal');
  // biome-ignore lint/suspicious/noControlCharactersInRegex: that there is none is the point
  expect(output).not.toMatch(/\u001b/);
  await expectNothingLeft(demo);
});

test.concurrent('a faster run shows its pulse instead of every row', async () => {
  const demo = await startDemo(['--events', '600', '--rate', '200', '--pods', '1'], {
    ...{ FORCE_COLOR: '1', COLUMNS: '80' },
  });

  expect(await demo.exited, demo.output()).toEqual({ code: 0 });

  expect(stripVTControlCharacters(demo.output())).toMatch(
    /\d+ rows in +\d+ entries out .* p50 .* ms, max .* ms/,
  );
  expect(demo.output().match(/row in/g)).toHaveLength(2);
  const happenings = stripVTControlCharacters(demo.output())
    .split('\n')
    .filter((line) => /^ +(row in|failed|dead|entry out|\d+ rows in) /.test(line));
  expect(happenings.length).toBeGreaterThan(5);
  expect(happenings.filter((line) => [...line].length > 80 || line.includes('…'))).toEqual([]);
  expect(demo.output()).toContain('\u001b[32m');
  await expectNothingLeft(demo);
});

test.concurrent('an entry that vanished from its stream is found: the promises did not hold, exit code 1', async () => {
  const demo = await startDemo(['--events', '30', '--rate', '20']);
  const [, port] = await says(demo, /Redis on port (\d+)/);
  await says(demo, /entry out .*#3 /);
  const redis = new Redis(Number(port), '127.0.0.1');
  const [first] = await redis.xrange('identity.user.v1', '-', '+', 'COUNT', 1);
  await redis.xdel('identity.user.v1', first?.[0] ?? '');
  redis.disconnect();

  expect(await demo.exited, demo.output()).toEqual({ code: 1 });

  expect(demo.output()).toMatch(/lost +1 /);
  expect(demo.output()).toMatch(/promises did not hold[\s\S]*publishedWithoutEntry: 1 /);
  await expectNothingLeft(demo);
});

test.concurrent('a signal ends the writing, what is on its way arrives, and the summary follows', async () => {
  const demo = await startDemo(['--events', '100000', '--rate', '20', '--pods', '1']);
  await says(demo, /failed .*#8 /);

  demo.child.kill('SIGINT');
  // As npm does, which passes on what the terminal has sent to all of us.
  demo.child.kill('SIGINT');

  expect(await demo.exited, demo.output()).toEqual({ code: 0 });
  expect(demo.output()).toMatch(/dead .*#8 [\s\S]*The promises held/);
  await expectNothingLeft(demo);
});

test.concurrent('a long run says what to try, and that works; another event fails, and one that was mended has its entry', async () => {
  const demo = await startDemo(['--events', '100000', '--rate', '20']);
  const [, name, password, board] = await says(
    demo,
    /dashboard: name (\S+), password (\S+)\n {4}(http\S+)\n/,
  );
  const [, metrics] = await says(demo, /^ {4}curl (\S+)$/m);
  const [, ...variables] = await says(demo, /^ {4}(export .*)\n {4}(export .*)$/m);
  const run = async (command: string) => {
    const shell = [...variables, command].join('; ');
    return (await promisify(execFile)('sh', ['-c', shell], { cwd: inject('root'), env: cleanEnvironment() }))
      .stdout;
  };

  const authorization = `Basic ${Buffer.from(`${name}:${password}`).toString('base64')}`;
  expect((await fetch(board ?? '', { headers: { authorization } })).status).toBe(200);
  expect(await (await fetch(metrics ?? '')).text()).toContain('relay_');
  expect(await run('node dist/cli.js status')).toMatch(/running .*jobs in progress/);
  await says(demo, /dead .*#8 /);
  const [, port, topic, replay] = await says(demo, /mend #8.*\n.* -p (\d+) DEL (\S+)\n {4}(node .*)\n/);
  const redis = new Redis(Number(port), '127.0.0.1');
  expect(await redis.del(topic ?? '')).toBe(1);
  expect(await run(`${replay} --yes`)).toMatch(/replayed 1 dead letter\./);
  await waitFor(() => redis.xlen(topic ?? ''), { what: 'the entry of what was mended' });
  await says(demo, /replayed .*#8 .*its entry is in demo\.broken-8\.v1/);
  redis.disconnect();
  await says(demo, /dead [\s\S]*dead .*given up after 3 attempts/);

  demo.child.kill('SIGINT');
  expect(await demo.exited, demo.output()).toEqual({ code: 0 });
  const [, events, entries, dead] = await says(
    demo,
    /The promises held\. (\d+) events: (\d+) entries, ([1-9]\d*) dead letters?;/,
  );
  expect(Number(entries)).toBe(Number(events) - Number(dead));
  await expectNothingLeft(demo);
});

test.concurrent('a second Ctrl-C ends it at once, and still leaves nothing behind', async () => {
  const demo = await startDemo(['--events', '100000', '--rate', '20', '--pods', '1']);
  await says(demo, /failed .*#8 /);
  demo.child.kill('SIGINT');
  await says(demo, /Once more to stop at once/);

  await waitFor(
    () => {
      demo.child.kill('SIGINT');
      return demo.child.exitCode !== null;
    },
    { what: 'the demo to end', timeoutMs: 6_000 },
  );

  expect(await demo.exited).toEqual({ code: 130 });
  await waitFor(async () => (await readdir(demo.temporary)).length === 0, { what: 'its files to be gone' });
  await expectNothingLeft(demo);
});

test.concurrent('a pod that dies ends the demo with a clear error and the last lines of the pods', async () => {
  const demo = await startDemo(['--events', '100000', '--rate', '20']);
  const [, pid] = await says(demo, /relay pod 2: pid (\d+)/);
  await says(demo, /entry out .*#3 /);

  process.kill(Number(pid), 'SIGKILL');

  expect(await demo.exited).toEqual({ code: 1 });
  expect(demo.output()).toMatch(
    /✗ Pod 2 ended unexpectedly \(SIGKILL\)\. Last lines of pod 1:[\s\S]*\{"level"[\s\S]*pod 2:/,
  );
  await expectNothingLeft(demo);
});

test.concurrent('without a Redis server it says in one line how to get one', async () => {
  const demo = await startDemo(['--events', '10'], { PATH: '/nowhere' });

  expect(await demo.exited).toEqual({ code: 1 });
  expect(demo.output()).toMatch(
    /✗ No redis-server or valkey-server on PATH: .*apt-get install.*RELAY_REDIS_SERVER_BIN/,
  );
  await expectNothingLeft(demo);
});

test.concurrent('--help describes the options, and a wrong one is named', async () => {
  const help = await startDemo(['--help']);
  expect(await help.exited).toEqual({ code: 0 });
  expect(help.output()).toMatch(/--events [\s\S]*does\s+not say what to try[\s\S]*--rate [\s\S]*--pods /);

  const wrong = await startDemo(['--events', 'many']);
  expect(await wrong.exited).toEqual({ code: 1 });
  expect(wrong.output()).toMatch(/--events.*'many' is invalid\. Expected a whole number from 10 to 200000/);
});
