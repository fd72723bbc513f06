/**
 * What may be done on the board, and what may not, and why. Every action that Bull Board offers is decided here: one
 * that a later version adds is refused until its effect was thought about.
 *
 * What remains leaves each row's fate right: a job that is removed comes back when its row's lease ends, unless its
 * dead letter is written; one that is retried or promoted is published, and its row with it, or fails again.
 */

export type QueueKind = 'claim' | 'publish';

/** Why it is refused on each queue; null where it is allowed. `all` is for actions on the whole board. */
type Decision = Readonly<{ action: string } & Record<QueueKind | 'all', string | null>>;

const everywhere = (action: string, reason: string | null): Decision => ({
  action,
  claim: reason,
  publish: reason,
  all: reason,
});
const onPublishOnly = (action: string, reason: string): Decision => ({
  action,
  claim: reason,
  publish: null,
  all: reason,
});

const NOT_THE_SCHEDULE = 'The claim schedule is the relay’s: its next tick comes by itself.';
const NO_RETRY_OF_CLAIMS = 'A claim that failed is not retried: the next tick does its work.';
const NOT_FROM_HERE =
  'Events come from the outbox table, and claims from their schedule: nothing is added here.';
const NOT_THE_DATA = 'A job holds the event as its row does: what is published must be what was committed.';
const NOT_ALL = 'This takes away what waits or is worked on. Pause the queue, or remove single jobs.';
const NOT_THE_LIMITS = 'How much runs at once is the relay’s: see RELAY_CONCURRENCY and RELAY_MAX_IN_FLIGHT.';
const NOT_THE_ORDER =
  'When an event is tried is the relay’s, in the order of its aggregate; promote a job to try it now.';
const NO_CHILDREN = 'The relay’s jobs have no children.';

/** By method and route, as Bull Board names them. */
const DECISIONS: Readonly<Record<string, Decision>> = {
  'put /api/queues/pause': everywhere('pause all', null),
  'put /api/queues/resume': everywhere('resume all', null),
  'put /api/queues/:queueName/pause': everywhere('pause', null),
  'put /api/queues/:queueName/resume': everywhere('resume', null),
  'put /api/queues/:queueName/rate-limit/release': everywhere('release the rate limit', null),
  'put /api/queues/:queueName/:jobId/retry': onPublishOnly('retry', NO_RETRY_OF_CLAIMS),
  'put /api/queues/:queueName/retry/:queueStatus': onPublishOnly('retry all', NO_RETRY_OF_CLAIMS),
  'put /api/queues/:queueName/:jobId/promote': onPublishOnly('promote', NOT_THE_SCHEDULE),
  'put /api/queues/:queueName/promote': onPublishOnly('promote all', NOT_THE_SCHEDULE),
  'put /api/queues/:queueName/:jobId/clean': everywhere('remove', null),
  'put /api/queues/:queueName/clean/:queueStatus': everywhere('clean', null),

  'post /api/queues/:queueName/add': everywhere('add', NOT_FROM_HERE),
  'patch /api/queues/:queueName/:jobId/update-data': everywhere('edit the data', NOT_THE_DATA),
  'patch /api/queues/:queueName/:jobId/delay': everywhere('reschedule', NOT_THE_ORDER),
  'patch /api/queues/:queueName/:jobId/priority': everywhere('change the priority', NOT_THE_ORDER),
  'put /api/queues/:queueName/empty': everywhere('empty', NOT_ALL),
  'put /api/queues/:queueName/obliterate': everywhere('obliterate', NOT_ALL),
  'put /api/queues/:queueName/concurrency': everywhere('change the concurrency', NOT_THE_LIMITS),
  'put /api/queues/:queueName/rate-limit': everywhere('change the rate limit', NOT_THE_LIMITS),
  'put /api/queues/:queueName/job-schedulers/:schedulerId/remove': everywhere(
    'remove the schedule',
    NOT_THE_SCHEDULE,
  ),
  'patch /api/queues/:queueName/job-schedulers/:schedulerId': everywhere(
    'change the schedule',
    NOT_THE_SCHEDULE,
  ),
  'put /api/queues/:queueName/job-schedulers/:schedulerId/run': everywhere(
    'run the schedule',
    NOT_THE_SCHEDULE,
  ),
  'put /api/queues/:queueName/:jobId/remove-unprocessed-children': everywhere('remove children', NO_CHILDREN),
};

/** Jobs of these states may be removed all at once. Of the claim queue no tick that is to come, nor a wish. */
const CLEANED: Readonly<Record<QueueKind, readonly string[]>> = {
  claim: ['failed', 'completed'],
  publish: ['failed', 'completed', 'delayed', 'wait', 'waiting'],
};

/** What Bull Board calls `method route` (such as `put /api/queues/:queueName/pause`), in short. */
export const actionOf = (method: string, route: string): string | undefined =>
  DECISIONS[`${method.toLowerCase()} ${route}`]?.action;

/**
 * Why this is refused, or null.
 * @param kind which of the relay's queues it is about; undefined for the whole board
 */
export function refusalOf(
  method: string,
  route: string,
  kind: QueueKind | undefined,
  status: string | undefined,
): string | null {
  if (method.toLowerCase() === 'get') return null;
  const decision = DECISIONS[`${method.toLowerCase()} ${route}`];
  if (decision === undefined) return 'Nobody has decided yet whether this harms the relay.';
  const reason = decision[kind ?? 'all'];
  if (reason !== null || decision.action !== 'clean' || kind === undefined) return reason;
  return CLEANED[kind].includes(status ?? '') ? null : NOT_ALL;
}
