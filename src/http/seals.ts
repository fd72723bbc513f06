import { createHmac, hkdfSync, timingSafeEqual } from 'node:crypto';
import { type BoardUser, entryOf } from '../config/board-users.ts';
import { shareAnswers } from './admission.ts';

/**
 * What a browser keeps for us, as text that only this deployment can have written: `<kind>.<end>.<name>.<signature>`.
 *
 * The key is made of the deployment's secret and of RELAY_BOARD_USERS. So every pod knows it; what another deployment
 * has sealed is worth nothing, though it has the same users; and any change of a password or a role ends what was
 * sealed before.
 */

/** The secret is read again so often: after it was deleted, or lost with Redis, everybody is out this soon. */
const SECRET_KEPT_MS = 5_000;
/** Clocks of pods differ. */
const CLOCK_DIFFERENCE_MS = 60_000;

export type Seals = ReturnType<typeof createSeals>;

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
     * The name, unless another hand wrote it, its time is over, or it is longer than such a thing lasts: then null.
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
