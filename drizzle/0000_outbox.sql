-- Creates the outbox on an empty database, and adopts one that is already there: only additions.
CREATE SCHEMA IF NOT EXISTS "identity";
--> statement-breakpoint
CREATE TABLE IF NOT EXISTS "identity"."outbox" (
	"id" bigserial PRIMARY KEY NOT NULL,
	"event_id" uuid DEFAULT gen_random_uuid() NOT NULL,
	"event_type" text NOT NULL,
	"aggregate_type" text DEFAULT 'user' NOT NULL,
	"aggregate_id" uuid NOT NULL,
	"payload" jsonb NOT NULL,
	"created_at" timestamp with time zone DEFAULT now() NOT NULL,
	"published" boolean DEFAULT false NOT NULL,
	"attempts" integer DEFAULT 0 NOT NULL,
	"next_attempt_at" timestamp with time zone,
	"published_at" timestamp with time zone,
	"error_message" text,
	"topic" text DEFAULT 'identity.user.v1',
	CONSTRAINT "outbox_event_id_unique" UNIQUE("event_id")
);
--> statement-breakpoint
ALTER TABLE "identity"."outbox" ADD COLUMN IF NOT EXISTS "dead_lettered_at" timestamp with time zone;
--> statement-breakpoint
ALTER TABLE "identity"."outbox" ADD COLUMN IF NOT EXISTS "stream_entry_id" text;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_fresh" ON "identity"."outbox" USING btree ("id") WHERE not published and next_attempt_at is null;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_due" ON "identity"."outbox" USING btree ("next_attempt_at") WHERE not published and next_attempt_at < 'infinity'::timestamptz;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_live" ON "identity"."outbox" USING btree ("aggregate_type","aggregate_id","id") WHERE not published and dead_lettered_at is null;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_parked" ON "identity"."outbox" USING btree ("aggregate_type","aggregate_id","id") WHERE not published and dead_lettered_at is null and next_attempt_at = 'infinity'::timestamptz;
--> statement-breakpoint
CREATE INDEX IF NOT EXISTS "relay_outbox_dead" ON "identity"."outbox" USING btree ("aggregate_type","aggregate_id","id") WHERE not published and dead_lettered_at is not null;
