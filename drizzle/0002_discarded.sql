-- What operators did with dead letters, and an index that lists these by time.
ALTER TABLE "identity"."outbox" ADD COLUMN IF NOT EXISTS "replayed_at" timestamp with time zone;
--> statement-breakpoint
ALTER TABLE "identity"."outbox" ADD COLUMN IF NOT EXISTS "discard_reason" text;
--> statement-breakpoint
ALTER TABLE "identity"."outbox" ADD COLUMN IF NOT EXISTS "discarded_by" text;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_dead_at" ON "identity"."outbox" USING btree ("dead_lettered_at","id") WHERE not published and dead_lettered_at is not null;
