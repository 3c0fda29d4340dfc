#!/bin/sh
# Gives each user of an ACL file a random password. The file goes to standard output, the passwords
# to standard error:
#
#   sh deploy/acl/fill-in.sh deploy/acl/prefill-region.acl > prefill.acl 2> prefill.passwords
set -eu

replacements=
for user in $(sed -n 's/.*#<sha256-of-\(.*\)-password>.*/\1/p' "$1"); do
  password=$(openssl rand -hex 32)
  hash=$(printf %s "$password" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
  replacements="${replacements}s/<sha256-of-$user-password>/$hash/;"
  echo "$user $password" >&2
done
sed "$replacements" "$1"
