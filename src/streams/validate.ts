import { createRequire } from 'node:module';
import type { ErrorObject, ValidateFunction } from 'ajv/dist/2020.js';
import { EVENT_SCHEMAS } from './event-schemas.ts';

/**
 * Every way in which a payload breaks the schema of its event type, as `member: what is wrong`; none for a valid
 * payload and for an event type without a schema. Safe to log and to store: no value of the payload is in it.
 */
type Validate = (eventType: string, payloadJson: string) => string[];

/** A payload of a thousand wrong members must not make a log line or a dead letter of a thousand lines. */
const MAX_VIOLATIONS = 50;
/** Of a member, or of one in a list: `changed_fields/1`. */
const MEMBER_NAME = /^([A-Za-z_]\w{0,39}(\/\d{1,6})?)?$/;

export function createValidator(): Validate {
  let schemas: ReadonlyMap<string, ValidateFunction> | undefined;

  return (eventType, payloadJson) => {
    if (!Object.hasOwn(EVENT_SCHEMAS, eventType)) return [];
    schemas ??= compiled();
    const schema = schemas.get(eventType) as ValidateFunction;
    let payload: unknown;
    try {
      payload = JSON.parse(payloadJson);
    } catch {
      return ['payload: is not JSON'];
    }
    if (schema(payload)) return [];
    const errors = schema.errors ?? [];
    const violations = errors.slice(0, MAX_VIOLATIONS).map(violationOf);
    const left = errors.length - violations.length;
    return left > 0 ? [...violations, `and ${left} more`] : violations;
  };
}

/** Ajv is loaded with the first event that needs it: with the schemas it takes 80 ms, which no start waits for. */
function compiled(): ReadonlyMap<string, ValidateFunction> {
  const require = createRequire(import.meta.url);
  const { Ajv2020 } = require('ajv/dist/2020.js') as typeof import('ajv/dist/2020.js');
  const addFormats = require('ajv-formats') as typeof import('ajv-formats').default;
  // That the schemas are schemas, a test checks.
  const ajv = new Ajv2020({ allErrors: true, allowUnionTypes: true, validateSchema: false });
  addFormats(ajv, ['uuid', 'email', 'date-time']);
  return new Map(
    Object.entries(EVENT_SCHEMAS).map(([eventType, schema]) => [eventType, ajv.compile(schema)]),
  );
}

/** Ajv's own texts are used only where they hold nothing but parts of the schema. */
function violationOf({ keyword, params, instancePath, message }: ErrorObject): string {
  const member = (name?: unknown): string =>
    shown([...instancePath.split('/').slice(1), ...(name === undefined ? [] : [String(name)])].join('/')) ||
    'payload';
  switch (keyword) {
    case 'required':
      return `${member(params.missingProperty)}: is missing`;
    case 'additionalProperties':
      return `${member(params.additionalProperty)}: is not allowed`;
    case 'enum':
      return `${member()}: must be one of ${params.allowedValues.join(', ')}`;
    case 'type':
      return `${member()}: must be ${[params.type].flat().join(' or ')}`;
    case 'format':
      return `${member()}: must be in the format ${params.format}`;
    default:
      return `${member()}: ${message ?? `breaks the rule ${keyword}`}`;
  }
}

/** A member that no schema knows has its name from the payload, which may hold personal data: only names are shown. */
const shown = (name: string): string => (MEMBER_NAME.test(name) ? name : 'a member whose name is not shown');
