/**
 * What the platform promises its consumers about the payloads of its user events, as JSON Schema 2020-12. Consumers
 * validate with schemas of their own: a change here has to follow theirs.
 */
const uuid = { type: 'string', format: 'uuid' } as const;
const dateTime = { type: 'string', format: 'date-time' } as const;
const flag = { type: 'boolean' } as const;
const textOrNull = { type: ['string', 'null'] } as const;

const DRAFT = { $schema: 'https://json-schema.org/draft/2020-12/schema' } as const;

const user = {
  user_id: uuid,
  tenant_id: uuid,
  email: { type: 'string', format: 'email' },
  display_name: textOrNull,
  // Ours: the envelope takes it from here, so an event that has one is not a bad event.
  correlation_id: uuid,
} as const;

const profile = {
  first_name: textOrNull,
  last_name: textOrNull,
  status: { type: 'string', enum: ['active', 'disabled'] },
  is_verified: flag,
  is_admin: flag,
  mfa_enabled: flag,
} as const;

const userCreated = {
  ...DRAFT,
  title: 'UserCreated',
  type: 'object',
  properties: { ...user, ...profile, created_at: dateTime },
  required: ['user_id', 'tenant_id', 'email', 'display_name', 'status', 'created_at'],
  additionalProperties: false,
} as const;

const userUpdated = {
  ...DRAFT,
  title: 'UserUpdated',
  type: 'object',
  properties: {
    ...user,
    ...profile,
    updated_at: dateTime,
    changed_fields: { type: 'array', items: { type: 'string' } },
  },
  required: ['user_id', 'tenant_id', 'email', 'display_name', 'status', 'updated_at', 'changed_fields'],
  additionalProperties: false,
} as const;

const userDisabled = {
  ...DRAFT,
  title: 'UserDisabled',
  type: 'object',
  properties: {
    ...user,
    disabled_at: dateTime,
    disabled_by: uuid,
    reason: {
      type: 'string',
      enum: ['admin_action', 'self_deletion', 'security_violation', 'policy_violation'],
    },
  },
  required: ['user_id', 'tenant_id', 'email', 'disabled_at', 'disabled_by', 'reason'],
  additionalProperties: false,
} as const;

/** By event type. */
export const EVENT_SCHEMAS = {
  UserCreated: userCreated,
  UserUpdated: userUpdated,
  UserDisabled: userDisabled,
} as const;
