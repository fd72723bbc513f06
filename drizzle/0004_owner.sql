-- By its token the database is known again in Redis, so that two of them never share a queue. "relay migrate" gives it one.
CREATE TABLE IF NOT EXISTS "identity"."relay_owner" (
	"is_only" boolean PRIMARY KEY DEFAULT true NOT NULL,
	"token" uuid DEFAULT gen_random_uuid() NOT NULL,
	CONSTRAINT "relay_owner_is_only" CHECK ("is_only")
);
--> statement-breakpoint
-- No secret, and roles that were given their rights before it was there need it.
GRANT SELECT ON "identity"."relay_owner" TO PUBLIC;
