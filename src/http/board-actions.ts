/**
 * Which actions of Bull Board are allowed, and why the others are refused. An action that a later version adds is refused
 * until it has been decided on here.
 *
 * An allowed action never leaves a row in a wrong state. A job that is removed comes back when its row's lease ends,
 * unless its dead letter is written. A job that is retried or promoted publishes its event and marks its row, or fails again.
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

const NOT_THE_SCHEDULE = 'The relay keeps the claim schedule: the next tick comes by itself.';
const NO_RETRY_OF_CLAIMS = 'A claim that failed is not retried: the next tick does its work.';
const NOT_FROM_HERE =
  'Events come from the outbox table, and claims from their schedule: nothing is added here.';
const NOT_THE_DATA = 'A job has the event of its row: what is published must be what was committed.';
const NOT_ALL = 'This removes jobs that wait or are being processed. Pause the queue, or remove single jobs.';
const NOT_THE_LIMITS =
  'The relay limits how many jobs run at once: see RELAY_CONCURRENCY and RELAY_MAX_IN_FLIGHT.';
const NOT_THE_ORDER = 'The relay tries events in the order of their aggregate. Promote a job to try it now.';
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

/** "Clean all" is allowed for these states: in the claim queue, not for the next tick or a wake that waits. */
const CLEANED: Readonly<Record<QueueKind, readonly string[]>> = {
  claim: ['failed', 'completed'],
  publish: ['failed', 'completed', 'delayed', 'wait', 'waiting'],
};

/** The short name of an action, for the log: `pause` for `put /api/queues/:queueName/pause`. */
export const actionOf = (method: string, route: string): string | undefined =>
  DECISIONS[`${method.toLowerCase()} ${route}`]?.action;

/**
 * Why the request is refused, or null.
 * @param kind which of the relay's queues it concerns; undefined for the whole board
 */
export function refusalOf(
  method: string,
  route: string,
  kind: QueueKind | undefined,
  status: string | undefined,
): string | null {
  if (method.toLowerCase() === 'get') return null;
  const decision = DECISIONS[`${method.toLowerCase()} ${route}`];
  if (decision === undefined) return 'Nobody has decided yet whether this action harms the relay.';
  const reason = decision[kind ?? 'all'];
  if (reason !== null || decision.action !== 'clean' || kind === undefined) return reason;
  return CLEANED[kind].includes(status ?? '') ? null : NOT_ALL;
}
