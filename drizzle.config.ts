import { defineConfig } from 'drizzle-kit';

export default defineConfig({
  dialect: 'postgresql',
  schema: './src/outbox/table.ts',
  out: './drizzle',
  schemaFilter: ['identity'],
  migrations: { schema: 'identity', table: 'relay_migrations' },
});
