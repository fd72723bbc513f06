import { createHmac, hkdfSync, timingSafeEqual } from 'node:crypto';
import { type BoardUser, entryOf } from '../config/board-users.ts';
import { shareAnswers } from './admission.ts';

/**
 * Signed cookies: `<kind>.<expiry, Unix time in ms>.<name>.<HMAC>`.
 *
 * The key is derived from the deployment's secret and RELAY_BOARD_USERS. So every pod has it, cookies of another deployment
 * are not accepted even if it has the same users, and every change of a user, password or role makes all cookies invalid.
 */

/** How long the secret is cached. After it was deleted, or lost with Redis, all sessions end within this time. */
const SECRET_KEPT_MS = 5_000;
/** Allowed difference between the clocks of pods. */
const CLOCK_DIFFERENCE_MS = 60_000;

/** @param secret of the deployment; at least 32 random bytes */
export function createSeals(secret: () => Promise<string>, users: readonly BoardUser[]) {
  const entries = users.map(entryOf).join('\n');
  const key = shareAnswers(SECRET_KEPT_MS, async () =>
    Buffer.from(hkdfSync('sha256', await secret(), entries, 'relay board', 32)),
  );
  const signatureOf = async (text: string) =>
    createHmac('sha256', await key())
      .update(text)
      .digest('base64url');

  return {
    async seal(kind: string, name: string, lifetimeMs: number): Promise<string> {
      const text = `${kind}.${Date.now() + lifetimeMs}.${name}`;
      return `${text}.${await signatureOf(text)}`;
    },

    /**
     * The name in the cookie. Null if the signature is wrong, the cookie has expired, or it would last longer than
     * `lifetimeMs`.
     * @throws when the secret cannot be read
     */
    async open(kind: string, sealed: string | undefined, lifetimeMs: number): Promise<string | null> {
      const [, text = '', of, end, name = '', signature = ''] =
        /^(([a-z]+)\.(\d{1,15})\.(.{1,64}))\.([A-Za-z0-9_-]{43})$/.exec(sealed ?? '') ?? [];
      if (of !== kind) return null;
      if (!timingSafeEqual(Buffer.from(await signatureOf(text)), Buffer.from(signature))) return null;
      const leftMs = Number(end) - Date.now();
      return leftMs > 0 && leftMs <= lifetimeMs + CLOCK_DIFFERENCE_MS ? name : null;
    },
  };
}
