-- The two indexes as earlier versions named them. Such a version, run again meanwhile, may have built its own anew.
DO $$ BEGIN
  IF to_regclass('identity.relay_outbox_with_entry') IS NULL THEN
    ALTER INDEX IF EXISTS "identity"."relay_outbox_settled" RENAME TO "relay_outbox_with_entry";
  ELSE
    DROP INDEX IF EXISTS "identity"."relay_outbox_settled";
  END IF;
END $$;
--> statement-breakpoint
DO $$ BEGIN
  IF to_regclass('identity.relay_outbox_without_entry') IS NULL THEN
    ALTER INDEX IF EXISTS "identity"."relay_outbox_unreceipted" RENAME TO "relay_outbox_without_entry";
  ELSE
    DROP INDEX IF EXISTS "identity"."relay_outbox_unreceipted";
  END IF;
END $$;
