import { expect, test } from 'vitest';
import { tracesWanted } from '../../src/telemetry/tracing.ts';

const ENDPOINT = { OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318' };

test.each([
  ['nothing', {}, false],
  ['an exporter', { OTEL_TRACES_EXPORTER: 'otlp' }, true],
  ['no exporter', { ...ENDPOINT, OTEL_TRACES_EXPORTER: 'none' }, false],
  ['an endpoint', ENDPOINT, true],
  ['an endpoint for traces', { OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: 'http://collector:4318/v1/traces' }, true],
  ['an endpoint for metrics alone', { OTEL_EXPORTER_OTLP_METRICS_ENDPOINT: 'http://collector:4318' }, false],
  ['an empty endpoint', { OTEL_EXPORTER_OTLP_ENDPOINT: ' ' }, false],
  ['a disabled SDK', { ...ENDPOINT, OTEL_SDK_DISABLED: 'True' }, false],
  ['an SDK that is not disabled', { ...ENDPOINT, OTEL_SDK_DISABLED: 'false' }, true],
])('an environment with %s: traces %s %s', (_what, env, wanted) => {
  expect(tracesWanted(env)).toBe(wanted);
});
