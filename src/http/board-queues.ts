import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import type { BeforeHook, QueueJobJson } from '@bull-board/api/typings/app';
import type { Job, Queue } from 'bullmq';
import { brief, counted, type OutboxEvent } from '../event.ts';
import { type QueueKind, refusalOf } from './board-actions.ts';

/**
 * The relay's two queues for Bull Board, with readable jobs. Only the fields listed in queue/job-views.ts and `dataOf`
 * are read from Redis and shown, whatever Bull Board asks for.
 */

/** Longer payloads are cut; the row has all of it. */
const MAX_PAYLOAD_CHARACTERS = 4_000;

/** Default number of jobs on one page. */
const PAGE_JOBS = 100;

const DESCRIPTIONS: Readonly<Record<QueueKind, string>> = {
  claim:
    'Takes fresh rows of the outbox and makes publish jobs of them: a tick on schedule, a wake when rows are written.',
  publish: 'One job per event: it appends the event to its stream. A failed job is a dead letter.',
};
const UNKNOWN = 'Dead: unknown, PostgreSQL gives no answer.';
const RETRY = 'Retry publishes a dead letter.';

/** How jobs are read; see queue/job-views.ts. */
type JobViews = Readonly<{
  one(id: string): Promise<Job | undefined>;
  page(states: readonly string[], start: number, end: number): Promise<Job[]>;
}>;

export type RelayQueues = Readonly<
  Record<QueueKind, Queue> & { views: Readonly<Record<QueueKind, JobViews>> }
>;

/** Bull Board's adapter, but jobs are read by `views`. The relay's jobs have neither logs nor children. */
class RelayQueueAdapter extends BullMQAdapter {
  readonly #views: JobViews;
  readonly #hint: () => string;
  readonly #remark: () => Promise<string>;
  #lastRemark = '';

  constructor(
    queue: Queue,
    views: JobViews,
    options: ConstructorParameters<typeof BullMQAdapter>[1],
    { hint, remark }: Readonly<{ hint: () => string; remark: () => Promise<string> }>,
  ) {
    super(queue, options);
    this.#views = views;
    this.#hint = hint;
    this.#remark = remark;
  }

  /** Bull Board calls this right before `getDescription`, which is synchronous: so the remark is read here. */
  override async getJobCounts() {
    const [counts, remark] = await Promise.all([super.getJobCounts(), this.#remark().catch(() => UNKNOWN)]);
    this.#lastRemark = remark;
    return counts;
  }

  /** At 1200 px it is cut after about 200 characters, in two lines. */
  override getDescription(): string {
    return [this.#lastRemark, this.#hint(), super.getDescription()].filter((it) => it !== '').join(' ');
  }

  override getJob(id: string): Promise<Job | undefined> {
    return this.#views.one(id);
  }

  override getJobs(states: readonly string[], start = 0, end = PAGE_JOBS - 1): Promise<Job[]> {
    return this.#views.page(states, start, end);
  }

  override async getJobLogs(): Promise<string[]> {
    return [];
  }

  override async getFlowProducer(): Promise<null> {
    return null;
  }

  override async getJobSchedulers() {
    return (await super.getJobSchedulers()).map(({ template: _, ...schedule }) => schedule);
  }
}

/**
 * @param showsPayload called for each job: payloads may hold personal data
 * @param options.mayRetry called for each answer: without buttons nobody is told what Retry does
 * @param options.backlog returns a sentence that is shown with the publish queue
 */
export function adaptersOf(
  queues: RelayQueues,
  showsPayload: () => boolean,
  { mayRetry = (): boolean => true, backlog = async () => '' } = {},
): BullMQAdapter[] {
  return (['publish', 'claim'] as const).map((kind) => {
    const isPublish = kind === 'publish';
    const options = { description: DESCRIPTIONS[kind], allowRetries: isPublish };
    const adapter = new RelayQueueAdapter(queues[kind], queues.views[kind], options, {
      hint: () => (isPublish && mayRetry() ? RETRY : ''),
      remark: isPublish ? backlog : async () => '',
    });
    adapter.setFormatter('name', nameOf);
    adapter.setFormatter('data', (data: unknown) => dataOf(data, showsPayload()));
    return adapter;
  });
}

/** For `handlerHooks.before`: refuses what would harm the relay. Other queues of the same board are not touched. */
export function createGuard(queues: RelayQueues): BeforeHook {
  const kinds = new Map<string, QueueKind>([
    [queues.claim.name, 'claim'],
    [queues.publish.name, 'publish'],
  ]);
  return ({ method, route, request }) => {
    const { queueName, queueStatus } = request.params as { queueName?: string; queueStatus?: string };
    const kind = kinds.get(queueName ?? '');
    if (queueName !== undefined && kind === undefined) return undefined;
    const message = refusalOf(method, route, kind, queueStatus);
    return message === null ? undefined : { allow: false, status: 403, message };
  };
}

const isEvent = (data: unknown): data is OutboxEvent =>
  typeof data === 'object' && data !== null && 'eventId' in data && 'eventType' in data;

/** `UserCreated · user 0192… · identity.user.v1 · attempt 2 of 6`. */
function nameOf(job: QueueJobJson): string {
  const { data } = job;
  if (!isEvent(data)) return job.name;
  const about = `${brief(data.eventType)} · ${brief(data.aggregateType)}:${data.aggregateId} · ${brief(data.topic)}`;
  return `${about} · ${attemptOf(job, data.attempts ?? 0)}`;
}

function attemptOf(job: QueueJobJson, before: number): string {
  const made = before + job.attemptsMade;
  if (job.finishedOn) return `given up after ${counted(made, 'attempt')}`;
  const next = `attempt ${made + 1} of ${Math.max(made + 1, before + (job.opts?.attempts ?? 1))}`;
  // Approximate: BullMQ counts the delay from the end of the last attempt, `processedOn` is its start.
  if (!job.delay || !job.processedOn) return next;
  return `${next} at ${new Date(job.processedOn + job.delay).toISOString().slice(0, 19)}Z`;
}

const HIDDEN = 'hidden: it may hold personal data';

function dataOf(data: unknown, showsPayload: boolean): unknown {
  if (typeof data === 'object' && data !== null) {
    if ('unreadBytes' in data)
      return `not read: ${data.unreadBytes} bytes are too many for this page; the row has them`;
    // Claim jobs have no data.
    if (Object.keys(data).length === 0) return data;
  }
  if (!isEvent(data)) return showsPayload ? data : HIDDEN;
  const { eventId, id, eventType, aggregateType, aggregateId, topic, occurredAt, withheld } = data;
  return {
    event_id: eventId,
    outbox_id: id,
    event_type: brief(eventType),
    aggregate: `${brief(aggregateType)}:${aggregateId}`,
    topic: brief(topic),
    occurred_at: occurredAt,
    ...(withheld && { withheld }),
    payload: showsPayload ? payloadOf(data.payload ?? '') : HIDDEN,
  };
}

function payloadOf(text: string): unknown {
  if (text.length > MAX_PAYLOAD_CHARACTERS) {
    return `${text.slice(0, MAX_PAYLOAD_CHARACTERS)}… (${text.length} characters; the row has them all)`;
  }
  // As text: parsing would round numbers of 16 digits.
  if (/\d{16}/.test(text)) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
