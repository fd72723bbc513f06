import { expect, test } from 'vitest';
import { actionOf, type QueueKind, refusalOf } from '../../src/http/board-actions.ts';
import { routesOfBullBoard } from '../support/board.ts';

const actions = routesOfBullBoard().filter((it) => !it.startsWith('get '));
const refused = (kind: QueueKind | undefined) =>
  actions.filter((it) => refusalOf(...(it.split(' ') as [string, string]), kind, 'failed') !== null);

test('every action of Bull Board is decided, and no other', () => {
  expect(actions.length).toBeGreaterThan(20);
  expect(actions.filter((it) => actionOf(...(it.split(' ') as [string, string])) === undefined)).toEqual([]);
  expect(refusalOf('put', '/api/queues/:queueName/explode', 'publish', undefined)).toMatch(
    /Nobody has decided/,
  );
});

test('what may be done is this', () => {
  const allowed = (kind: QueueKind) => actions.filter((it) => !refused(kind).includes(it));
  expect(allowed('publish')).toEqual([
    'put /api/queues/pause',
    'put /api/queues/resume',
    'put /api/queues/:queueName/retry/:queueStatus',
    'put /api/queues/:queueName/promote',
    'put /api/queues/:queueName/clean/:queueStatus',
    'put /api/queues/:queueName/pause',
    'put /api/queues/:queueName/resume',
    'put /api/queues/:queueName/rate-limit/release',
    'put /api/queues/:queueName/:jobId/retry',
    'put /api/queues/:queueName/:jobId/clean',
    'put /api/queues/:queueName/:jobId/promote',
  ]);
  expect(allowed('claim')).toEqual([
    'put /api/queues/pause',
    'put /api/queues/resume',
    'put /api/queues/:queueName/clean/:queueStatus',
    'put /api/queues/:queueName/pause',
    'put /api/queues/:queueName/resume',
    'put /api/queues/:queueName/rate-limit/release',
    'put /api/queues/:queueName/:jobId/clean',
  ]);
});

test('all at once goes what has failed, and of the publish queue what waits; never what is worked on', () => {
  const clean = (kind: QueueKind, status: string) =>
    refusalOf('put', '/api/queues/:queueName/clean/:queueStatus', kind, status) === null;
  expect(clean('publish', 'delayed')).toBe(true);
  expect(clean('publish', 'active')).toBe(false);
  expect(clean('claim', 'failed')).toBe(true);
  for (const status of ['delayed', 'wait', 'active']) expect(clean('claim', status)).toBe(false);
});
