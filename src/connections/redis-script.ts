import type { Redis } from 'ioredis';

type Command<R> = (...keysAndArgs: (string | number | Buffer)[]) => Promise<R>;

/**
 * Defines a Lua script as a command of the connection.
 * @param numberOfKeys where the script always has as many; otherwise each call names it first
 * @returns the command, looked up at each call: what replaces it on the connection is called
 */
export function script<R>(redis: Redis, name: string, lua: string, numberOfKeys?: number): Command<R> {
  redis.defineCommand(name, { lua, ...(numberOfKeys !== undefined && { numberOfKeys }) });
  const commands = redis as unknown as Record<string, Command<R>>;
  return (...keysAndArgs) => (commands[name] as Command<R>).apply(redis, keysAndArgs);
}
