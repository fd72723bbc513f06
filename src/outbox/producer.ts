/**
 * `appendEvent`, for backends. It works with the client that the backend has, and loads nothing else. If the relay is
 * asleep, the trigger of wakeup.ts wakes it, and a pod claims the row: claim/claim.ts.
 */

/** A domain event as its producer knows it. */
export type NewEvent = {
  /** e.g. `UserCreated` */
  eventType: string;
  /** Default: `user`. */
  aggregateType?: string;
  /** uuid. Events of one aggregate are published in the order of their rows. */
  aggregateId: string;
  /** Anything that JSON can say. `tenant_id` and `correlation_id`, when present, go into the envelope. */
  payload: unknown;
  /** Key of the Redis stream. Default: `RELAY_STREAM_NAME` of the relay; an adopted column keeps its default. */
  topic?: string;
  /** uuid; consumers deduplicate on it. Default: made by the database. */
  eventId?: string;
  /**
   * For the column `headers`, which the table must have then; `traceparent` and `tracestate` of W3C Trace Context go
   * on into the stream entry. At most 8 kB.
   */
  headers?: Readonly<Record<string, string>>;
};

/** A client of node-postgres inside BEGIN … COMMIT, of whatever version. */
export type PgTransaction = {
  // biome-ignore lint/suspicious/noExplicitAny: each version of node-postgres has other types of its rows
  query(text: string, values: unknown[]): PromiseLike<{ rows: any[] }>;
  /** Only a pool has it, and that inserts outside of the transaction. */
  totalCount?: never;
};

/** A transaction of drizzle, of whatever version, on node-postgres or postgres.js. */
export type DrizzleTransaction = {
  // biome-ignore lint/suspicious/noExplicitAny: each version of drizzle has other types of its own
  execute(query: any): PromiseLike<any>;
  insert: unknown;
};

export type Transaction = PgTransaction | DrizzleTransaction;

/**
 * Writes an event into the outbox, within the caller's own transaction: it exists if and only if that commits.
 *
 * Order within an aggregate is the order of the rows' ids. Ids are given out at insert, so transactions on one
 * aggregate must not overlap (lock or update the aggregate's own row first, as most do anyway).
 *
 * @param tx the client of the transaction, not the pool, which would insert outside of it
 * @returns the row's id (the position in its aggregate's order) and its event id
 * @throws {TypeError} when `tx` is a pool of node-postgres, or a database of drizzle on one
 */
export async function appendEvent(
  tx: Transaction,
  event: NewEvent,
): Promise<{ id: bigint; eventId: string }> {
  if (isPool(tx) || ('$client' in tx && isPool(tx.$client)))
    throw new TypeError(
      'appendEvent was given a pool, which inserts outside of your transaction: pass the client that has begun it, or the tx of db.transaction()',
    );
  const { payload, headers } = event;
  // Only columns with a value are named: the producer's role needs no right to the others.
  const columns: readonly (readonly [name: string, value: unknown])[] = [
    ['event_id', event.eventId],
    ['event_type', event.eventType],
    ['aggregate_type', event.aggregateType],
    ['aggregate_id', event.aggregateId],
    ['payload', JSON.stringify(payload)],
    ['topic', event.topic],
    ['headers', headers && JSON.stringify(headers)],
  ];
  const given = columns.filter(([, value]) => value !== undefined);
  const into = `INSERT INTO identity.outbox (${given.map(([name]) => name).join(', ')}) VALUES (`;
  const returning = ') RETURNING id::text AS id, event_id';
  const values = given.map(([, value]) => value);
  const rows = isDrizzle(tx)
    ? await insertByDrizzle(tx, into, values, returning)
    : (await tx.query(`${into}${values.map((_, i) => `$${i + 1}`).join(', ')}${returning}`, values)).rows;
  const [row] = rows as { id: string; event_id: string }[];
  if (row === undefined) throw new Error('the INSERT into identity.outbox returned no row');
  return { id: BigInt(row.id), eventId: row.event_id };
}

// A database of drizzle on a single client may be within that client's transaction; `$client` tells.
const isPool = (it: unknown): boolean =>
  typeof it === 'object' && it !== null && typeof (it as { totalCount?: unknown }).totalCount === 'number';

// A client of node-postgres has no `insert`. A transaction of drizzle has a `query` too, but it is something else.
const isDrizzle = (tx: Transaction): tx is DrizzleTransaction => 'insert' in tx && 'execute' in tx;

async function insertByDrizzle(
  tx: DrizzleTransaction,
  into: string,
  values: readonly unknown[],
  returning: string,
): Promise<unknown[]> {
  // The backend's own drizzle: it is installed, since `tx` comes from it. Other backends need not have it.
  const { sql } = await import('drizzle-orm');
  const list = sql.join(
    values.map((value) => sql`${value}`),
    sql`, `,
  );
  const result = await tx.execute(sql`${sql.raw(into)}${list}${sql.raw(returning)}`);
  return Array.isArray(result) ? result : result.rows;
}
