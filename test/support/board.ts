import { createBullBoard } from '@bull-board/api';
import type { AppControllerRoute, IServerAdapter } from '@bull-board/api/typings/app';
import { entryOf } from '../../src/config/board-users.ts';
import { hashPassword } from '../../src/http/passwords.ts';

/** A password's hash that costs little. */
export const cheapHash = (password: string): Promise<string> =>
  hashPassword(password, { logN: 10, r: 8, p: 1 });

/** Of everybody in these tests. */
export const PASSWORD = 'correct horse battery';

/** A viewer `vera` and an operator `olga`, as RELAY_BOARD_USERS. */
export async function boardUsers(): Promise<string> {
  const hash = await cheapHash(PASSWORD);
  return [{ name: 'vera', role: 'viewer', hash } as const, { name: 'olga', role: 'operator', hash } as const]
    .map(entryOf)
    .join(' ');
}

export const basicOf = (name: string, password = PASSWORD): string =>
  `Basic ${Buffer.from(`${name}:${password}`).toString('base64')}`;

export type Answer = Readonly<{ status: number; body: unknown }>;

/** Asks Bull Board at `url` as its page does. */
export function boardApi(url: string, name: string) {
  return async (method: string, path: string, body?: unknown): Promise<Answer> => {
    const response = await fetch(`${url}/board/api/queues${path}`, {
      method,
      headers: {
        authorization: basicOf(name),
        ...(body !== undefined && { 'content-type': 'application/json' }),
      },
      ...(body !== undefined && { body: JSON.stringify(body) }),
      signal: AbortSignal.timeout(10_000),
    });
    const text = await response.text();
    return { status: response.status, body: text === '' ? null : JSON.parse(text) };
  };
}

/** Every route that Bull Board registers, as `method route`. */
export function routesOfBullBoard(): string[] {
  const routes: AppControllerRoute[] = [];
  const adapter: Record<string, unknown> = new Proxy(
    {},
    {
      get: (_, name) => (given: unknown) => {
        if (name === 'setApiRoutes') routes.push(...(given as AppControllerRoute[]));
        return adapter;
      },
    },
  );
  createBullBoard({ queues: [], serverAdapter: adapter as unknown as IServerAdapter });
  return routes.flatMap(({ method, route }) =>
    [method].flat().flatMap((it) => [route].flat().map((path) => `${it} ${path}`)),
  );
}
