# shellcheck shell=bash
# What scripts/deploy-aws calls: AWS's command line, or in a dry run a print of the call. Not a program.
# shellcheck disable=SC2154 # Its variables are set by scripts/deploy-aws.

fail() {
    printf 'deploy-aws: %s\n' "$1" >&2
    if [ $# -gt 1 ]; then
        printf '            fix: %s\n' "$2" >&2
    fi
    exit 1
}

say() {
    printf 'deploy-aws: %s\n' "$*"
}

# A call that only reads.
aws_read() {
    if [ -n "$dry" ]; then
        printf '(%s %s)' "$1" "$2"
    else
        aws ${endpoint[@]+"${endpoint[@]}"} "$@"
    fi
}

# A call that changes something.
aws_do() {
    if [ -n "$dry" ]; then
        printf '  aws'
        printf ' %q' "$@"
        printf '\n'
    else
        aws ${endpoint[@]+"${endpoint[@]}"} "$@"
    fi
}

# The same without its answer.
aws_quietly() {
    if [ -n "$dry" ]; then
        aws_do "$@"
    else
        aws_do "$@" >/dev/null
    fi
}

do_or_print() {
    if [ -n "$dry" ]; then
        printf '  %s\n' "$*"
    else
        "$@"
    fi
}

need() {
    command -v "$1" >/dev/null || fail "$1 was not found" "$2"
}

region() {
    local found=${AWS_REGION:-${AWS_DEFAULT_REGION:-}}
    if [ -z "$found" ] && [ -n "$dry" ]; then
        found=us-east-1
    fi
    found=${found:-$(aws configure get region || true)}
    [ -n "$found" ] || fail "no region is set" "--region us-east-1, or AWS_REGION"
    printf '%s' "$found"
}

# An output of the stack; nothing if there is none. They are asked for once, and again after each change of the stack.
output() {
    if [ -n "$dry" ]; then
        printf '(%s)' "$1"
        return
    fi
    if [ ! -s "$work/outputs" ]; then
        aws_read cloudformation describe-stacks --stack-name "$stack" --output text \
            --query 'Stacks[0].Outputs[].[OutputKey, OutputValue]' >"$work/outputs" 2>/dev/null || return 0
    fi
    awk -F '\t' -v key="$1" '$1 == key { printf "%s", $2 }' "$work/outputs"
}

needed_output() {
    local value
    value=$(output "$1")
    [ -n "$value" ] || fail "stack $stack has no output $1" "scripts/deploy-aws up"
    printf '%s' "$value"
}

# The parameters as KEY=VALUE: those of the file, then those of --set.
overrides() {
    sed -n 's/.*"ParameterKey": *"\([^"]*\)", *"ParameterValue": *"\([^"]*\)".*/\1=\2/p' "$parameters"
    printf '%s\n' ${sets[@]+"${sets[@]}"}
}

# The value of a parameter by the file and --set.
parameter() {
    overrides | sed -n "s/^$1=//p" | tail -1
}

# Makes or updates the stack. Parameters that are not named keep their value.
deploy() {
    local given=() line
    while read -r line; do
        if [ -n "$line" ]; then given+=("$line"); fi
    done < <(overrides)
    rm -f "$work/outputs"
    aws_do cloudformation deploy --stack-name "$stack" --template-file "$template" --capabilities CAPABILITY_IAM \
        --no-fail-on-empty-changeset --tags application=refarch --parameter-overrides "${given[@]}" "$@" || {
        aws_read cloudformation describe-stack-events --stack-name "$stack" --output text --query \
            "StackEvents[?contains(ResourceStatus, 'FAILED')].[LogicalResourceId, ResourceStatusReason]" | head -20 >&2
        fail "the stack was not deployed" "read the reasons above; a first stack that failed: scripts/deploy-aws down"
    }
}

json_text() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# Starts a one-off task with a command line, and prints its ARN.
start_task() {
    local command_line=$1
    shift
    aws_read ecs run-task --cluster "$(needed_output Cluster)" --task-definition "$(needed_output ToolsTask)" \
        --launch-type FARGATE --started-by deploy-aws --query 'tasks[0].taskArn' --output text "$@" --network-configuration \
        "awsvpcConfiguration={subnets=[$(needed_output Subnets)],securityGroups=[$(needed_output ToolsGroup)],assignPublicIp=DISABLED}" \
        --overrides "{\"containerOverrides\":[{\"name\":\"tools\",\"command\":[$(json_text "$command_line")]}]}"
}

# What a task says of itself, by a query.
of_task() {
    aws_read ecs describe-tasks --cluster "$(needed_output Cluster)" --tasks "$1" --query "tasks[0].$2" --output text
}

# Runs a command line as a one-off task, prints its log, and fails if it failed.
run_task() {
    local task status='' code
    say "task: $1"
    if [ -n "$dry" ]; then
        printf '  aws ecs run-task --task-definition (ToolsTask) ... %q\n' "$1"
        return
    fi
    task=$(start_task "$1")
    [[ $task == arn:* ]] || fail "no task was started ($task)" "look at the service's limits: aws ecs describe-clusters"
    while [ "$status" != STOPPED ]; do
        sleep "${REFARCH_DEPLOY_POLL_S:-5}"
        status=$(of_task "$task" lastStatus)
    done
    aws_read logs filter-log-events --log-group-name "/refarch/$stack/tools" --log-stream-names "tools/tools/${task##*/}" \
        --query 'events[].[message]' --output text 2>/dev/null || true
    code=$(of_task "$task" 'containers[0].exitCode')
    [ "$code" = 0 ] || fail "the task failed (exit code $code): $(of_task "$task" stoppedReason)" "its log is above"
}
