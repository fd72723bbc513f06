import { afterEach, beforeAll, beforeEach, expect, test, vi } from 'vitest';
import { createMarkers, type JobTimes, MARKER_TTL_S } from '../../src/stream/markers.ts';
import { createRedis } from '../support/servers.ts';
import { type AdminRedis, aClaimedEvent, openAdminRedis, openRedis } from '../support/stages.ts';

const [STREAM, DLQ, EPOCH_KEY, EPOCH] = ['identity.user.v1', 'identity.user.v1.dlq', 'bull:relay:epoch', 'e'];
const HOUR_MS = 3_600_000;

let redis: AdminRedis;
let job: JobTimes | null;
let beforeAnswer: () => void;
let isSettled: boolean;
let searches: number;
let markers: ReturnType<typeof createMarkers>;

beforeAll(async () => {
  const server = await createRedis();
  redis = openAdminRedis(server.adminUrl);
  markers = createMarkers(openRedis(server.url), {
    ...{ prefix: 'bull:relay', epochKey: EPOCH_KEY },
    job: async () => {
      beforeAnswer();
      return job;
    },
    isSettled: async () => isSettled,
    find: async (stream, eventId) => {
      searches++;
      const entries = await redis.xrange(stream, '-', '+');
      return entries.find(([, fields]) => fields.includes(eventId))?.[0];
    },
  });
});

beforeEach(async () => {
  await redis.flushall();
  await redis.set(EPOCH_KEY, EPOCH);
  [job, beforeAnswer, isSettled, searches] = [{ madeAt: Date.now(), endedAt: null }, () => {}, false, 0];
});

afterEach(() => {
  vi.useRealTimers();
});

const event = aClaimedEvent();
const publish = () => markers.append(event, STREAM, EPOCH, false, ['*', 'event_id', event.eventId]);
const deadLetter = () => markers.append(event, DLQ, EPOCH, true, ['*', 'event_id', event.eventId]);

test('an entry is appended once, whichever job asks', async () => {
  const id = await publish();
  expect(id).toMatch(/^\d+-\d+$/);
  job = { madeAt: Date.now() + 1, endedAt: null };
  expect(await publish()).toBe(`=${id}`);
  expect(await redis.xlen(STREAM)).toBe(1);
});

test('without a job, of the wrong kind, or in another epoch nothing is appended', async () => {
  expect(await deadLetter()).toBe('');
  job = { madeAt: 1, endedAt: Date.now() };
  expect(await publish()).toBe('');
  job = null;
  expect([await publish(), await deadLetter()]).toEqual(['', '']);
  job = { madeAt: Date.now(), endedAt: null };
  await redis.set(EPOCH_KEY, 'another');
  expect(await publish()).toBe('!');
  expect(await redis.exists(STREAM, DLQ)).toBe(0);
});

test('a marker lives for an hour from the last time that somebody asked', async () => {
  await publish();
  const [key = ''] = await redis.keys('bull:relay:entry:*');
  expect(await redis.ttl(key)).toBeGreaterThan(MARKER_TTL_S - 10);
  await redis.expire(key, 100);
  await publish();
  expect(await redis.ttl(key)).toBeGreaterThan(MARKER_TTL_S - 10);
});

test('a job that is older than its marker may be finds what it appended, and nothing once its row is settled', async () => {
  const id = await publish();
  await redis.del(await redis.keys('bull:relay:entry:*'));
  job = { madeAt: Date.now() - HOUR_MS, endedAt: null };
  expect(await publish()).toBe(`=${id}`);
  expect(searches).toBe(1);
  await redis.del(STREAM);
  isSettled = true;
  expect(await publish()).toBe('');
  isSettled = false;
  expect(await publish()).toMatch(/^\d+-\d+$/);
});

test('an event that is replayed may die again, and a job that is retried reports its dead letter', async () => {
  job = { madeAt: 1, endedAt: Date.now() };
  const first = await deadLetter();
  expect(await deadLetter()).toBe(`=${first}`);
  job = { madeAt: 1, endedAt: null };
  isSettled = false;
  expect(await publish()).toMatch(new RegExp(`^\\d+-\\d+\\|${first}$`));
  job = { madeAt: 2, endedAt: Date.now() };
  expect(await deadLetter()).toMatch(/^\d+-\d+$/);
});

test('what a pod that was stopped in between knows of the job is not believed any more', async () => {
  vi.useFakeTimers({ toFake: ['Date'] });
  beforeAnswer = () => vi.setSystemTime(Date.now() + 6_000);
  await expect(publish()).rejects.toThrow(/out of date/);
  expect(await redis.exists(STREAM)).toBe(0);
});
