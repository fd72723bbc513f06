import { randomInt, randomUUID } from 'node:crypto';

/** An event as a producer would write it: the columns of `identity.outbox` that the producer fills. */
export type SampleEvent = {
  eventId: string;
  eventType: string;
  aggregateType: string;
  aggregateId: string;
  /** An object, or JSON text where every character counts. */
  payload: Readonly<Record<string, unknown>> | string;
  /** null: the default stream */
  topic: string | null;
  createdAt: Date;
};

export const TOPIC = 'identity.user.v1';

const TENANT = '7b0f3c52-4f0e-4a39-9a55-2f5f6a1b8c11';
const FIRST_NAMES = [
  'Ada',
  'Alan',
  'Barbara',
  'Edsger',
  'Grace',
  'Hedy',
  'Jörg',
  'Katherine',
  'Linus',
  'Márta',
  'Radia',
];
const LAST_NAMES = [
  'Dijkstra',
  'Hamilton',
  'Hopper',
  'Johnson',
  'Keßler',
  'Lamarr',
  'Liskov',
  'Lovelace',
  'Perlman',
];

export type UserEventType = 'UserCreated' | 'UserUpdated' | 'UserDisabled';

/** A realistic event of one user, valid for the platform's schema of its type. */
export function sampleEvent(
  eventType: UserEventType = 'UserCreated',
  userId: string = randomUUID(),
  name = `${pick(FIRST_NAMES)} ${pick(LAST_NAMES)}`,
): SampleEvent {
  const [first = '', last = ''] = name.split(' ');
  const createdAt = new Date();
  const now = createdAt.toISOString();
  const user = {
    user_id: userId,
    tenant_id: TENANT,
    email: `${ascii(first)}.${ascii(last)}@example.com`,
    display_name: name,
  };
  const payloads = {
    UserCreated: {
      ...user,
      ...{ first_name: first, last_name: last, status: 'active' },
      ...{ is_verified: false, is_admin: false, mfa_enabled: false, created_at: now },
    },
    UserUpdated: {
      ...user,
      ...{ first_name: first, last_name: last, status: 'active' },
      ...{ is_verified: true, is_admin: false, mfa_enabled: true, updated_at: now },
      changed_fields: ['display_name', 'is_verified', 'mfa_enabled'],
    },
    UserDisabled: {
      ...user,
      ...{
        disabled_at: now,
        disabled_by: '0d9f6b1e-58a3-4c58-8f0b-6f6b7f0f2a10',
        reason: 'policy_violation',
      },
    },
  };
  return {
    eventId: randomUUID(),
    eventType,
    aggregateType: 'user',
    aggregateId: userId,
    payload: payloads[eventType],
    topic: TOPIC,
    createdAt,
  };
}

function pick(names: readonly string[]): string {
  return names[randomInt(names.length)] ?? '';
}

function ascii(name: string): string {
  const plain = name.toLowerCase().replaceAll('ß', 'ss').normalize('NFD');
  return plain.replaceAll(/[^a-z]/g, '');
}
