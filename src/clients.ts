/** What the relay needs of clients that the program around it brings, of whatever version these are. */

/** A pool of node-postgres. */
export type PgPool = Readonly<{
  // biome-ignore lint/suspicious/noExplicitAny: each version of node-postgres has a type of its own for a client
  connect(): Promise<any>;
}>;

/** A client of ioredis. */
export type RedisClient = Readonly<{
  options: object;
  // biome-ignore lint/suspicious/noExplicitAny: each version of ioredis has types of its own
  duplicate(override?: any): any;
}>;
