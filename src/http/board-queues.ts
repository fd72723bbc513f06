import { BullMQAdapter } from '@bull-board/api/bullMQAdapter';
import type { BeforeHook, QueueJobJson } from '@bull-board/api/typings/app';
import type { Queue } from 'bullmq';
import { brief, type OutboxEvent } from '../event.ts';
import { type QueueKind, refusalOf } from './board-actions.ts';

/** The relay's two queues as Bull Board shows them: jobs that say what they are about. */

/** A payload that is longer is cut; all of it is in the row. */
const MAX_PAYLOAD_CHARACTERS = 4_000;

const DESCRIPTIONS: Readonly<Record<QueueKind, string>> = {
  claim:
    'Takes fresh rows of the outbox and makes publish jobs of them: a tick on schedule, a wake when rows are written.',
  publish:
    'One job per event: appends it to its stream. A failed job is a dead letter; Retry publishes it after all.',
};

export type RelayQueues = Readonly<Record<QueueKind, Queue>>;

/** @param showsPayload asked for each job: payloads hold personal data */
export function adaptersOf(queues: RelayQueues, showsPayload: () => boolean): BullMQAdapter[] {
  return (['publish', 'claim'] as const).map((kind) => {
    const adapter = new BullMQAdapter(queues[kind], {
      description: DESCRIPTIONS[kind],
      allowRetries: kind === 'publish',
    });
    adapter.setFormatter('name', nameOf);
    adapter.setFormatter('data', (data: unknown) => dataOf(data, showsPayload()));
    return adapter;
  });
}

/** For `handlerHooks.before`: refuses what would harm the relay, and leaves other queues of the same board alone. */
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
  const about = `${brief(data.eventType)} · ${brief(data.aggregateType)} ${data.aggregateId} · ${brief(data.topic)}`;
  return `${about} · ${attemptOf(job, data.attempts ?? 0)}`;
}

function attemptOf(job: QueueJobJson, before: number): string {
  const made = before + job.attemptsMade;
  if (job.finishedOn) return `given up after ${made} ${made === 1 ? 'attempt' : 'attempts'}`;
  const next = `attempt ${made + 1} of ${Math.max(made + 1, before + (job.opts?.attempts ?? 1))}`;
  // BullMQ counts the delay from the end of the attempt before, a moment after its start.
  if (!job.delay || !job.processedOn) return next;
  return `${next} at ${new Date(job.processedOn + job.delay).toISOString().slice(0, 19)}Z`;
}

function dataOf(data: unknown, showsPayload: boolean): unknown {
  if (!isEvent(data)) return data;
  const { eventId, id, eventType, aggregateType, aggregateId, topic, occurredAt, withheld } = data;
  return {
    event_id: eventId,
    outbox_id: id,
    event_type: brief(eventType),
    aggregate: `${brief(aggregateType)} ${aggregateId}`,
    topic: brief(topic),
    occurred_at: occurredAt,
    ...(withheld && { withheld }),
    payload: showsPayload ? payloadOf(data.payload ?? '') : 'hidden: it may hold personal data',
  };
}

function payloadOf(text: string): unknown {
  if (text.length > MAX_PAYLOAD_CHARACTERS) {
    return `${text.slice(0, MAX_PAYLOAD_CHARACTERS)}… (${text.length} characters; the row has them all)`;
  }
  // As text where a number would not survive being parsed.
  if (/\d{16}/.test(text)) return text;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
