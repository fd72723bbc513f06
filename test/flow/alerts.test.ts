/**
 * Every alert of observability/alerts.yml fires: a real Prometheus scrapes real pods under the condition that the alert
 * is for. Time runs faster in it, see ../support/prometheus.ts.
 */
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import pLimit from 'p-limit';
import { Client } from 'pg';
import { expect, inject, onTestFinished, test } from 'vitest';
import { parse } from 'yaml';
import { startPrivatePostgres } from '../demo/servers.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { insertEvents, someEvents } from '../support/events.ts';
import { STREAM, type Stage, setStage } from '../support/flow.ts';
import { type Firing, type Prometheus, type Rules, startPrometheus } from '../support/prometheus.ts';
import { folderOfFile } from '../support/servers.ts';
import { waitFor } from '../support/wait.ts';

const RULES: Rules = parse(readFileSync(join(inject('root'), 'observability/alerts.yml'), 'utf8'));
const ALERTS = RULES.groups.flatMap(({ rules }) => rules.map(({ alert }) => alert));

/** Ten minutes in Prometheus are one. */
const FAST = 10;
/** /metrics takes up to 2 s while a server hangs; a scrape waits as long as its interval here. */
const SLOW = 5;
const FIRES_WITHIN_MS = 180_000;
/** Between two questions to Prometheus, whose rules are evaluated less often than that. */
const POLL_MS = 400;
const LIMIT_MS = 300_000;
const SKEWED_CLOCK = new URL('../chaos/skewed-clock.mjs', import.meta.url).href;
const BROKEN = 'identity.broken.v1';

const hostOf = (url: string): string => new URL(url).host;

/** A Prometheus that has scraped each of them. */
async function watch(targets: readonly string[], speed = FAST): Promise<Prometheus> {
  const prometheus = await startPrometheus({ targets: targets.map(hostOf), rules: RULES, speed });
  await waitFor(async () => (await prometheus.query('up == 1')).length === targets.length, {
    what: 'Prometheus to have scraped every pod',
    timeoutMs: FIRES_WITHIN_MS,
    pollMs: POLL_MS,
  });
  return prometheus;
}

/** Waits until the alert fires, and answers the labels of those that do. */
async function fires(prometheus: Prometheus, alert: string): Promise<Firing[]> {
  return waitFor(
    async () => {
      const found = (await prometheus.firing()).filter(({ alertname }) => alertname === alert);
      return found.length > 0 ? found : undefined;
    },
    { what: `${alert} to fire`, timeoutMs: FIRES_WITHIN_MS, pollMs: POLL_MS },
  );
}

/** Writes a few events now and again, until the test ends. */
function keepWriting(stage: Stage): void {
  let ended = false;
  const write = async (): Promise<void> => {
    while (!ended) {
      await insertEvents(stage.pool, someEvents(5)).catch(() => {});
      await new Promise((resolve) => setTimeout(resolve, 200));
    }
  };
  const writing = write();
  onTestFinished(async () => {
    ended = true;
    await writing;
  });
}

type Case = Readonly<{ fires: readonly string[]; when: string; run(): Promise<void> }>;

/** What takes longest comes first: they run a few at a time. */
const CASES: readonly Case[] = [
  {
    fires: [],
    when: 'a relay has nothing but work',
    run: nothingFires,
  },
  {
    fires: ['RelayGroupLag', 'RelayTrimRisk'],
    when: 'a consumer group has not read for long',
    async run() {
      const stage = await setStage({ env: { RELAY_STREAM_MAXLEN: '11000' } });
      await stage.redis.xgroup('CREATE', STREAM, 'mailer', '$', 'MKSTREAM');
      const pipeline = stage.redis.pipeline();
      for (let i = 0; i < 10_500; i++) pipeline.xadd(STREAM, '*', 'event_id', String(i));
      await pipeline.exec();
      const prometheus = await watch([(await stage.pod()).url]);
      const about = { stream: STREAM, group: 'mailer' };
      expect(await fires(prometheus, 'RelayTrimRisk')).toMatchObject([about]);
      expect(await fires(prometheus, 'RelayGroupLag')).toMatchObject([about]);
    },
  },
  {
    fires: ['RelayQueuePaused', 'RelayBacklogAge', 'RelayNoTick'],
    when: 'the claim queue is paused',
    async run() {
      const stage = await setStage();
      const pod = await stage.pod();
      const queue = stage.queue('claim');
      await queue.pause();
      // A claim that is in progress goes on.
      await waitFor(async () => (await queue.getActiveCount()) === 0, { what: 'the claims to end' });
      const createdAt = new Date(Date.now() - 61_000);
      await insertEvents(stage.pool, someEvents(3, 3, { createdAt }));
      const prometheus = await watch([pod.url]);
      expect(await fires(prometheus, 'RelayQueuePaused')).toMatchObject([{ queue: 'claim' }]);
      await fires(prometheus, 'RelayBacklogAge');
      await fires(prometheus, 'RelayNoTick');
    },
  },
  {
    fires: ['RelayClocksDiffer'],
    when: 'the clocks of database and Redis differ (what a pod says of them, with another number)',
    async run() {
      const prometheus = await watch([await altered('relay_clock_difference_seconds', '-3')]);
      await fires(prometheus, 'RelayClocksDiffer');
    },
  },
  {
    fires: ['RelayNotReady', 'RelayFiguresMissing'],
    when: 'Redis hangs',
    async run() {
      const stage = await setStage();
      const prometheus = await watch([(await stage.pod()).url], SLOW);
      stage.server.pause();
      await fires(prometheus, 'RelayNotReady');
      await fires(prometheus, 'RelayFiguresMissing');
    },
  },
  {
    fires: ['RelayPodClock'],
    when: 'the clock of one of two pods is an hour behind',
    async run() {
      const stage = await setStage();
      const skewed = { NODE_OPTIONS: `--import=${SKEWED_CLOCK}`, CHAOS_CLOCK_OFFSET_MS: '-3600000' };
      const [off, right] = [await stage.pod(skewed), await stage.pod()];
      const prometheus = await watch([off.url, right.url]);
      const firing = await fires(prometheus, 'RelayPodClock');
      expect(firing.map(({ instance }) => instance)).toEqual([hostOf(off.url)]);
    },
  },
  {
    fires: ['RelayNotifyQueueFills'],
    when: 'a session listens and does not read',
    async run() {
      const directory = join(await folderOfFile(), `postgres-with-a-small-queue-${randomUUID()}`);
      const postgres = await startPrivatePostgres({ directory, settings: { max_notify_queue_pages: 64 } });
      atEndOfFile(() => postgres.kill('SIGQUIT'));
      const stage = await setStage({ databaseUrl: postgres.url });
      expect((await stage.command(['migrate'])).code).toBe(0);
      const prometheus = await watch([(await stage.pod()).url]);
      const deaf = new Client({ connectionString: postgres.url });
      deaf.on('error', () => {});
      await deaf.connect();
      await deaf.query('LISTEN nobody');
      await deaf.query('BEGIN; SELECT 1');
      await stage.pool.query(
        `SELECT pg_notify('nobody', repeat('x', 7900) || i) FROM generate_series(1, 20) i`,
      );
      await fires(prometheus, 'RelayNotifyQueueFills');
      await deaf.end();
    },
  },
  {
    fires: ['RelayPodDown', 'RelayAbsent'],
    when: 'a pod is killed, then the last one',
    async run() {
      const stage = await setStage();
      const [one, other] = [await stage.pod(), await stage.pod()];
      const prometheus = await watch([one.url, other.url]);
      await one.kill('SIGKILL');
      expect(await fires(prometheus, 'RelayPodDown')).toMatchObject([{ instance: hostOf(one.url) }]);
      expect((await prometheus.firing()).map(({ alertname }) => alertname)).not.toContain('RelayAbsent');
      await other.kill('SIGKILL');
      await fires(prometheus, 'RelayAbsent');
    },
  },
  {
    fires: ['RelayDeadLetters', 'RelayDeadLettersGrowing'],
    when: 'all events of a topic that nobody had seen before are refused for good at once',
    async run() {
      const stage = await setStage({
        env: { RELAY_MAX_RETRY_ATTEMPTS: '1', RELAY_RETRY_BASE_DELAY: '0.1' },
      });
      await stage.redis.set(BROKEN, 'a string');
      const pod = await stage.pod();
      const prometheus = await watch([pod.url]);
      await insertEvents(stage.pool, someEvents(12, 12, { topic: BROKEN }));
      await fires(prometheus, 'RelayDeadLetters');
      const about = { topic: BROKEN, event_type: 'UserCreated' };
      expect(await fires(prometheus, 'RelayDeadLettersGrowing')).toMatchObject([about]);
    },
  },
  {
    fires: ['RelayRetryingLong'],
    when: 'an event of an hour ago is being retried',
    async run() {
      const stage = await setStage();
      await stage.redis.set(BROKEN, 'a string');
      const pod = await stage.pod();
      const createdAt = new Date(Date.now() - 3_600_000);
      await insertEvents(stage.pool, someEvents(1, 1, { topic: BROKEN, createdAt }));
      await fires(await watch([pod.url]), 'RelayRetryingLong');
    },
  },
  {
    fires: ['RelayRedisFull'],
    when: 'Redis is full while events come',
    async run() {
      const stage = await setStage();
      const prometheus = await watch([(await stage.pod()).url]);
      keepWriting(stage);
      await stage.redis.config('SET', 'maxmemory', '1');
      await fires(prometheus, 'RelayRedisFull');
    },
  },
  {
    fires: ['RelayRedisRefuses'],
    when: 'Redis has become a replica',
    async run() {
      const stage = await setStage();
      const prometheus = await watch([(await stage.pod()).url]);
      keepWriting(stage);
      await stage.redis.replicaof('127.0.0.1', 1);
      expect(await fires(prometheus, 'RelayRedisRefuses')).toMatchObject([{ reason: 'readonly' }]);
    },
  },
  {
    fires: ['RelayRedisLostData', 'RelayRedisLostDataForGood'],
    when: 'Redis was emptied while no pod ran, and one of its streams has become something else',
    async run() {
      const stage = await setStage();
      const pod = await stage.pod();
      await insertEvents(stage.pool, [...someEvents(20), ...someEvents(20, 20, { topic: BROKEN })]);
      await stage.rested();
      await pod.kill('SIGTERM');
      await stage.redis.multi().flushall().set(BROKEN, 'a string').exec();
      const next = await stage.pod();
      await waitFor(async () => (await stage.redis.exists(STREAM)) === 1, { what: 'the entries to be back' });
      const prometheus = await watch([next.url]);
      await fires(prometheus, 'RelayRedisLostData');
      await fires(prometheus, 'RelayRedisLostDataForGood');
    },
  },
  {
    fires: ['RelayJobsLost'],
    when: 'the jobs of events that are on their way vanish',
    async run() {
      const stage = await setStage({ env: { RELAY_CLAIM_LEASE: '2', RELAY_PUBLISH_TIMEOUT: '0.5' } });
      const prometheus = await watch([(await stage.pod()).url]);
      const queue = stage.queue('publish');
      await queue.pause();
      await insertEvents(stage.pool, someEvents(150));
      await waitFor(async () => (await stage.count('next_attempt_at > now()')) === 150, {
        what: 'the events to be claimed',
        timeoutMs: 60_000,
      });
      await stage.redis.del(await stage.redis.keys('bull:relay-publish:*'));
      await fires(prometheus, 'RelayJobsLost');
    },
  },
];

/** As long as the longest `for`: no alert fires, and Prometheus renames no label. */
async function nothingFires(): Promise<void> {
  const stage = await setStage();
  await stage.redis.xgroup('CREATE', STREAM, 'mailer', '$', 'MKSTREAM');
  const pods = [await stage.pod(), await stage.pod()];
  const prometheus = await watch(
    pods.map(({ url }) => url),
    SLOW,
  );
  keepWriting(stage);
  const endsAt = Date.now() + (10 * 60_000) / SLOW;
  await waitFor(
    async () => {
      expect(await prometheus.firing()).toEqual([]);
      return Date.now() > endsAt;
    },
    { what: 'the time to pass', timeoutMs: LIMIT_MS, pollMs: POLL_MS },
  );
  const stored = await prometheus.query('count by (__name__) ({job="relay", __name__=~"relay_.*"})');
  expect(stored.length).toBeGreaterThan(20);
  // So it would call those of ours that are its own.
  expect((await prometheus.labels()).filter((label) => label.startsWith('exported_'))).toEqual([]);
}

/** A server of what a pod answers to /metrics, but with another value of one metric. Answers its URL. */
async function altered(name: string, value: string): Promise<string> {
  const stage = await setStage();
  const pod = await stage.pod();
  const server = createServer(async (_, response) => {
    const text = await (await fetch(`${pod.url}/metrics`)).text();
    response.setHeader('content-type', 'text/plain; version=0.0.4');
    response.end(text.replaceAll(new RegExp(`^(${name}(?:{[^}]*})?) .*$`, 'gm'), `$1 ${value}`));
  });
  await new Promise<void>((listening) => server.listen(0, '127.0.0.1', listening));
  onTestFinished(() => void server.close());
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

test('every alert has a case here in which it fires', () => {
  expect(CASES.flatMap(({ fires: names }) => names).sort()).toEqual([...ALERTS].sort());
});

/** So many relays, each with its servers and its Prometheus, at once: they mostly wait. */
const AT_ONCE = 5;

test(
  'each of them fires when it should, and none when it should not',
  async () => {
    const limit = pLimit(AT_ONCE);
    const failures: string[] = [];
    const running = CASES.map(({ fires: names, when, run }) =>
      limit(run).catch((error: Error) =>
        failures.push(`${names.join(', ') || 'none'}: ${when}: ${error.message}`),
      ),
    );
    await Promise.all(running);
    expect(failures).toEqual([]);
  },
  2 * LIMIT_MS,
);
