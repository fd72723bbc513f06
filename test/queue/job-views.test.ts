/** What a dashboard reads of jobs: only what it shows, of jobs alone, and no more than a page may have. */
import { Queue } from 'bullmq';
import { beforeAll, beforeEach, expect, test } from 'vitest';
import { createJobViews, type JobViews } from '../../src/queue/job-views.ts';
import { atEndOfFile } from '../support/cleanup.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, openAdminRedis, openRedis } from '../support/stages.ts';

let admin: AdminRedis;
let queue: Queue;
let views: JobViews;

beforeAll(async () => {
  const server = await createRedis();
  admin = openAdminRedis(server.adminUrl);
  const redis = openRedis(server.url);
  queue = new Queue('relay-publish', { connection: redis });
  atEndOfFile(() => queue.close());
  views = createJobViews(redis, queue);
});

beforeEach(async () => {
  await admin.flushall();
});

const SECRET = 'ada@example.org';

test('what is not shown does not leave Redis: traces, stack, result, progress, logs', async () => {
  await queue.add('A', { a: 1 }, { jobId: 'one', attempts: 3, telemetry: { metadata: SECRET } });
  await queue.addJobLog('one', SECRET);
  await admin.hset('bull:relay-publish:one', {
    ...{ stacktrace: JSON.stringify([SECRET]), returnvalue: JSON.stringify(SECRET), progress: `"${SECRET}"` },
    ...{
      failedReason: 'WRONGTYPE',
      atm: 2,
      ats: 2,
      processedOn: 1_700_000_000_000,
      defa: SECRET,
      pb: SECRET,
    },
  });
  const job = await views.one('one');
  expect(job?.toJSON()).toMatchObject({
    ...{ id: 'one', name: 'A', data: { a: 1 }, attemptsMade: 2, failedReason: 'WRONGTYPE' },
    ...{ processedOn: 1_700_000_000_000, opts: { attempts: 3 } },
  });
  expect(JSON.stringify(job?.toJSON())).not.toContain(SECRET);
  const page = await views.page(['waiting'], 0, 9);
  expect(page).toHaveLength(1);
  expect(JSON.stringify(page.map((it) => it.toJSON()))).not.toContain(SECRET);
});

test('a job that was read so is the job: it can be retried and removed', async () => {
  await queue.add('A', {}, { jobId: 'one', delay: 60_000 });
  await (await views.one('one'))?.promote();
  expect(await queue.getJobState('one')).toBe('waiting');
  await (await views.one('one'))?.remove();
  expect(await queue.getJobState('one')).toBe('unknown');
});

test('other keys of the queue are no jobs, whatever their type', async () => {
  await queue.add('A', {}, { jobId: 'one', delay: 60_000 });
  await queue.upsertJobScheduler('tick', { every: 60_000 }, { name: 'tick' });
  for (const id of ['meta', 'delayed', 'failed', 'events', 'id', 'repeat', 'repeat:tick', 'no such job', ''])
    expect(await views.one(id), id).toBeUndefined();
  const scheduled = (await queue.getRanges(['waiting', 'delayed'], 0, 9)).find((id) =>
    id.startsWith('repeat:tick:'),
  );
  expect((await views.one(String(scheduled)))?.repeatJobKey).toBe('tick');
});

test('a page has a limit in bytes: what is too long stays in Redis, and is said to', async () => {
  const jobs = Array.from({ length: 20 }, (_, i) => ({
    name: 'A',
    data: { text: 'x'.repeat(200_000) },
    opts: { jobId: `job${i}` },
  }));
  await queue.addBulk([
    ...jobs,
    { name: 'B', data: { text: 'x'.repeat(5_000_000) }, opts: { jobId: 'long' } },
  ]);
  await admin.hset('bull:relay-publish:job1', 'failedReason', 'y'.repeat(1_000_000));
  const page = await views.page(['waiting'], 0, 99);
  expect(page).toHaveLength(21);
  const text = JSON.stringify(page.map((it) => it.toJSON()));
  expect(text.length).toBeGreaterThan(900_000);
  expect(text.length).toBeLessThan(1_200_000);
  const unread = page.filter(({ data }) => data.unreadBytes !== undefined);
  expect(unread.length).toBe(16);
  const long = await views.one('long');
  expect([long?.name, long?.data.unreadBytes]).toEqual(['B', 5_000_011]);
  expect((await views.one('job3'))?.data.text).toHaveLength(200_000);
});

test('jobs that are none of ours are shown as they can be', async () => {
  await queue.add('A', {}, { jobId: 'one' });
  await admin.hset('bull:relay-publish:one', { data: '{"cut', opts: '[', timestamp: 'soon' });
  expect((await views.one('one'))?.toJSON()).toMatchObject({ data: {}, timestamp: 0, name: 'A' });
  await admin.rpush('bull:relay-publish:wait', 'gone');
  expect(await views.page(['waiting'], 0, 9)).toHaveLength(1);
});
