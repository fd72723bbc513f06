import { Job, type Queue } from 'bullmq';
import type { Redis } from 'ioredis';
import { script } from '../connections/redis-script.ts';

/**
 * Jobs as people see them. Only what is shown is read from Redis: neither stack traces, results, logs and progress,
 * nor the trace context in the options, which a payload may have brought; and of a page no more bytes than a pod can
 * hold many times over.
 */

/** Data of one page, and of a job by itself. What is longer stays in Redis. */
const PAGE_BYTES = 1 << 20;
const JOB_BYTES = 4 << 20;
/** Of each other field; reasons have 2,000 characters. */
const FIELD_BYTES = 8_192;

const FIELDS = [
  ...['name', 'opts', 'failedReason', 'timestamp', 'delay', 'priority'],
  ...['processedOn', 'finishedOn', 'atm', 'ats', 'stc', 'rjk'],
] as const;

/** In place of data that was not read. */
type UnreadData = Readonly<{ unreadBytes: number }>;

/**
 * KEYS: jobs. ARGV: bytes of data in all, bytes of one field, the fields. Answers of each job its data ('' if not
 * read), the length of that, and the fields; of a key that is no hash an empty list.
 */
const VIEW = `
local left = tonumber(ARGV[1])
local most = tonumber(ARGV[2])
local answer = {}
for i, key in ipairs(KEYS) do
  answer[i] = {}
  if redis.call('TYPE', key).ok == 'hash' then
    local bytes = redis.call('HSTRLEN', key, 'data')
    local job = {'', bytes}
    if bytes <= left then
      left = left - bytes
      job[1] = redis.call('HGET', key, 'data') or ''
    end
    for f = 3, #ARGV do
      job[f] = string.sub(redis.call('HGET', key, ARGV[f]) or '', 1, most)
    end
    answer[i] = job
  end
end
return answer`;

export type JobViews = ReturnType<typeof createJobViews>;

export function createJobViews(redis: Redis, queue: Queue) {
  const viewJobs = script<[data: string, bytes: number, ...fields: string[]][]>(redis, 'viewJobs', VIEW);

  async function read(ids: readonly string[], bytesInAll: number): Promise<Job[]> {
    if (ids.length === 0) return [];
    const keys = ids.map((id) => queue.toKey(id));
    const found = await viewJobs(keys.length, ...keys, bytesInAll, FIELD_BYTES, ...FIELDS);
    return found.flatMap(([data, bytes, ...values], i) => {
      if (data === undefined || bytes === undefined) return [];
      const unread: UnreadData = { unreadBytes: bytes };
      return [jobOf(queue, ids[i] as string, data || JSON.stringify(bytes > 0 ? unread : {}), values)];
    });
  }

  return {
    /** The job without its data. */
    brief: async (id: string): Promise<Job | undefined> => (await read([id], 0))[0],
    /** The job, or undefined where nothing of that id is in one of the queue's lists: other keys are no jobs. */
    async one(id: string): Promise<Job | undefined> {
      if ((await queue.getJobState(id)) === 'unknown') return undefined;
      return (await read([id], JOB_BYTES))[0];
    },
    /** Jobs of these states; positions from 0, both included. */
    async page(states: readonly string[], start: number, end: number): Promise<Job[]> {
      const types = [...states] as Parameters<Queue['getRanges']>[0];
      return read(await queue.getRanges(types, start, end), PAGE_BYTES);
    },
  };
}

function jobOf(queue: Queue, id: string, data: string, values: readonly string[]): Job {
  const field = (name: (typeof FIELDS)[number]) => values[FIELDS.indexOf(name)] ?? '';
  const count = (name: (typeof FIELDS)[number]) => Number.parseInt(field(name), 10) || 0;
  const [processedOn, finishedOn, repeatJobKey] = [count('processedOn'), count('finishedOn'), field('rjk')];
  return Job.fromJSON(
    queue as Parameters<typeof Job.fromJSON>[0],
    {
      ...{ id, name: field('name'), data: isJson(data) ? data : '{}', opts: shownOptions(field('opts')) },
      ...{ timestamp: count('timestamp'), delay: count('delay'), priority: count('priority') },
      ...{ attemptsMade: count('atm'), attemptsStarted: count('ats'), stalledCounter: count('stc') },
      ...{ progress: 0, stacktrace: '[]', failedReason: field('failedReason') },
      ...(processedOn > 0 && { processedOn }),
      ...(finishedOn > 0 && { finishedOn }),
      ...(repeatJobKey !== '' && { repeatJobKey }),
    } as unknown as Parameters<typeof Job.fromJSON>[1],
    id,
  );
}

/** How often and when it is tried; of the trace context among them nothing. */
function shownOptions(text: string): object {
  if (!isJson(text)) return {};
  const { attempts, backoff, delay } = JSON.parse(text) as Record<string, unknown>;
  return { attempts, backoff, delay };
}

function isJson(text: string): boolean {
  try {
    return JSON.parse(text) !== null;
  } catch {
    return false;
  }
}
