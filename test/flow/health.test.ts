import { expect, test } from 'vitest';
import { anEvent, insertEvents, someEvents } from '../support/events.ts';
import { setStage } from '../support/flow.ts';
import { waitFor } from '../support/wait.ts';

type Answer = { status: number; type: string | null; body: Record<string, unknown> };

async function ask(url: string): Promise<Answer> {
  const response = await fetch(url, { signal: AbortSignal.timeout(10_000) });
  return {
    status: response.status,
    type: response.headers.get('content-type'),
    body: (await response.json()) as Record<string, unknown>,
  };
}

test('the health endpoints of a healthy relay answer 200 and tell what they looked at', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  const json = 'application/json; charset=utf-8';
  expect(await ask(`${pod.url}/livez`)).toEqual({
    status: 200,
    type: json,
    body: { status: 'alive', reasons: [] },
  });
  expect(await ask(`${pod.url}/readyz`)).toMatchObject({
    status: 200,
    type: json,
    body: { status: 'ready', checks: { database: { status: 'healthy' }, redis: { status: 'healthy' } } },
  });
  const service = { service: 'relay-service', version: expect.stringMatching(/^\d+\.\d+\.\d+/) };
  expect(await ask(`${pod.url}/health`)).toEqual({
    status: 200,
    type: json,
    body: { status: 'healthy', ...service },
  });
  expect(await ask(`${pod.url}/health/detailed`)).toMatchObject({
    status: 200,
    body: {
      status: 'healthy',
      ...service,
      timestamp: expect.stringMatching(/Z$/),
      checks: {
        database: { status: 'healthy', latency_ms: expect.any(Number) },
        redis: { status: 'healthy', aof_enabled: true, latency_ms: expect.any(Number) },
        backlog: {
          status: 'healthy',
          ...{ fresh: 0, leased: 0, retrying: 0, due: 0, parked: 0, dead: 0 },
          oldest_waiting_seconds: null,
        },
      },
    },
  });
  expect((await fetch(`${pod.url}/nothing-here`)).status).toBe(404);
  for (const path of ['/', '/board', '/board/queue/relay-publish', '/api/dlq'])
    expect(await ask(`${pod.url}${path}`)).toMatchObject({
      status: 404,
      body: { error: expect.stringContaining('RELAY_BOARD=true') },
    });
});

test('the backlog tells rows by state, and is degraded when an event that should be out waits too long', async () => {
  // A quarter of the jobs in Redis are one aggregate's, at most.
  const stage = await setStage({ env: { RELAY_MAX_RETRY_ATTEMPTS: '0', RELAY_MAX_IN_FLIGHT: '16' } });
  const pod = await stage.pod();
  await stage.redis.set('identity.broken.v1', 'a string');
  await insertEvents(stage.pool, [anEvent({ topic: 'identity.broken.v1' })]);
  await stage.rested();
  await stage.queue('publish').pause();
  await insertEvents(stage.pool, someEvents(12, 1));
  const backlog = async () => {
    const { body } = await ask(`${pod.url}/health/detailed`);
    return (body.checks as Record<string, unknown>).backlog;
  };
  await waitFor(async () => (await stage.count('next_attempt_at IS NULL AND NOT published')) === 0, {
    what: 'the rows to be claimed',
  });
  expect(await backlog()).toMatchObject({
    ...{ status: 'healthy', fresh: 0, leased: 4, due: 0, parked: 8, dead: 1 },
    // Those that are leased should be out.
    oldest_waiting_seconds: expect.any(Number),
  });
  // Claiming stops too, so what comes now stays fresh.
  await stage.queue('claim').pause();
  // A claim stays for a moment, in case that more is written.
  const claims = () => stage.queue('claim').getActiveCount();
  await waitFor(async () => (await claims()) === 0, { what: 'the last claim to end' });
  await insertEvents(stage.pool, [anEvent({ createdAt: new Date(Date.now() - 90_000) })]);
  await waitFor(async () => ((await backlog()) as { fresh: number }).fresh === 1, { what: 'a fresh row' });
  const found = (await backlog()) as { status: string; oldest_waiting_seconds: number };
  expect(found.status).toBe('degraded');
  expect(found.oldest_waiting_seconds).toBeGreaterThan(89);
  expect((await ask(`${pod.url}/health`)).status).toBe(200);
});

test('while Redis hangs the relay is alive and not ready, and ready again after it', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  stage.server.pause();
  try {
    // For a second the last answer is given again.
    await waitFor(async () => (await ask(`${pod.url}/readyz`)).status === 503, {
      what: 'the pod not to be ready',
    });
    expect(await ask(`${pod.url}/readyz`)).toMatchObject({
      status: 503,
      body: {
        status: 'not ready',
        checks: {
          database: { status: 'healthy' },
          redis: { status: 'unhealthy', error: expect.any(String) },
        },
      },
    });
    expect(await ask(`${pod.url}/health`)).toMatchObject({ status: 503, body: { status: 'unhealthy' } });
    expect(await ask(`${pod.url}/health/detailed`)).toMatchObject({ status: 503 });
    expect(await ask(`${pod.url}/livez`)).toMatchObject({ status: 200, body: { status: 'alive' } });
  } finally {
    stage.server.resume();
  }
  await pod.waitReady();
});

test('a Redis without AOF makes the health degraded, with a warning, and the relay stays ready', async () => {
  const stage = await setStage({ redisArgs: ['--appendonly', 'no'] });
  const pod = await stage.pod();
  const { status, body } = await ask(`${pod.url}/health/detailed`);
  expect(status).toBe(200);
  expect(body).toMatchObject({
    status: 'degraded',
    checks: { redis: { status: 'degraded', aof_enabled: false, warning: expect.stringContaining('AOF') } },
  });
  expect((await ask(`${pod.url}/readyz`)).status).toBe(200);
});

test('a port that is taken ends the start with exit code 69 and names the variable', async () => {
  const stage = await setStage();
  const pod = await stage.pod();
  const { code, lines } = await stage.command(['start'], { RELAY_HTTP_PORT: new URL(pod.url).port });
  expect(code).toBe(69);
  expect(lines.join('\n')).toMatch(/cannot listen on 127\.0\.0\.1:\d+ .*RELAY_HTTP_PORT.*EADDRINUSE/);
});

test('relay check finds nothing to complain about in a good environment', async () => {
  const stage = await setStage();
  const { code, lines } = await stage.command(['check']);
  expect(code, lines.join('\n')).toBe(0);
  const results = lines.map((line) => /^(\S+)\s+(.+?)\s{2,}/.exec(line)?.slice(1, 3));
  expect(results).toEqual(
    [
      ...['configuration', 'database', 'writable', 'transactions', 'table', 'claim', 'wake-up'],
      ...['Redis', 'AOF', 'eviction policy', 'queues', 'streams', 'owner'],
    ].map((it) => ['ok', it]),
  );
});

test('relay check gives advice on a missing trigger and on AOF, and does not fail for it', async () => {
  const stage = await setStage({ redisArgs: ['--appendonly', 'no'] });
  await stage.command(['migrate', '--no-notify']);
  const { code, lines } = await stage.command(['check']);
  expect(code, lines.join('\n')).toBe(0);
  expect(lines.join('\n')).toMatch(/^advice\s+wake-up\s.*relay migrate/m);
  expect(lines.join('\n')).toMatch(/^advice\s+AOF\s.*appendonly yes/m);
});

test('relay check fails for an eviction policy that drops keys and for a missing table, and names both', async () => {
  const stage = await setStage({ redisArgs: ['--maxmemory-policy', 'allkeys-lru'] });
  await stage.pool.query('DROP TABLE identity.outbox');
  const { code, lines } = await stage.command(['check']);
  expect(code).toBe(1);
  expect(lines.join('\n')).toMatch(/^failed\s+table\s.*identity\.outbox.*relay migrate/m);
  expect(lines.join('\n')).toMatch(/^failed\s+eviction policy\s.*allkeys-lru.*noeviction/m);
});

test('relay check fails for a table that lacks a column or an index, and names them', async () => {
  const stage = await setStage();
  await stage.pool.query('ALTER TABLE identity.outbox DROP COLUMN stream_entry_id');
  await stage.pool.query('DROP INDEX identity.relay_outbox_due');
  const { code, lines } = await stage.command(['check']);
  expect(code).toBe(1);
  expect(lines.join('\n')).toMatch(/^failed\s+table\s.*stream_entry_id.*relay_outbox_due/m);
});

test('relay check gives its results on servers that cannot be reached, without secrets', async () => {
  const stage = await setStage();
  const { code, lines } = await stage.command(['check'], {
    RELAY_DATABASE_URL: 'postgres://me:hunter2@127.0.0.1:9/db',
    RELAY_REDIS_URL: 'redis://:hunter2@127.0.0.1:9',
  });
  expect(code).toBe(1);
  const text = lines.join('\n');
  expect(text).toMatch(/^failed\s+database\s.*ECONNREFUSED/m);
  expect(text).toMatch(/^failed\s+Redis\s.*ECONNREFUSED/m);
  expect(text).not.toContain('hunter2');
});
