# What a stack costs: prices.toml, then lines of parameters as in small.json (later ones win).
#
#   awk -f config/aws/cost.awk config/aws/prices.toml config/aws/small.json

FNR == 1 { file++ }
file == 1 && /^[a-z].* = / { price[$1] = $3; remembered[$1] = / # from memory/ }
file > 1 && /"ParameterKey"/ { split($0, part, "\""); set[part[4]] = part[8] }

function item(name, month) {
    printf "  %-46s %9.2f\n", name, month
    total += month
}
function task(cpu, memory) {
    return hours * (cpu / 1024 * vcpu + memory / 1024 * gb)
}
function known(key) {
    if (!(key in price)) {
        print "cost: prices.toml has no price for " key > "/dev/stderr"
        failed = 1
        exit 1
    }
    if (remembered[key] && !(key in named)) {
        named[key] = 1
        memory = memory (memory ? ", " : "") key
    }
    return price[key]
}

END {
    if (failed) exit 1
    hours = 730
    arm = set["Architecture"] == "ARM64" ? "arm_" : ""
    vcpu = known("fargate_" arm "vcpu_hour")
    gb = known("fargate_" arm "gb_hour")
    zones = set["DatabaseMultiAz"] == "true" ? 2 : 1
    nats = set["NatPerZone"] == "yes" ? 2 : 1

    print "Monthly cost at rest, in US dollars (us-east-1, 730 hours, the least number of tasks):"
    item(set["ServeTasks"] " serve", set["ServeTasks"] * task(set["ServeCpu"], set["ServeMemory"]))
    item(set["ListenMin"] " listen", set["ListenMin"] * task(set["ListenCpu"], set["ListenMemory"]))
    item(set["EmbedMin"] " embed", set["EmbedMin"] * task(set["EmbedCpu"], set["EmbedMemory"]))
    item("database " set["DatabaseClass"], zones * hours * known(set["DatabaseClass"]))
    item(set["DatabaseStorage"] " GB of storage", zones * set["DatabaseStorage"] * known("rds_gb_month"))
    item(nats " NAT gateway", nats * hours * (known("nat_hour") + known("public_address_hour")))
    item("load balancer", hours * (known("load_balancer_hour") + 2 * known("public_address_hour")))
    # Ours; those of Container Insights for a cluster with three services, about; alarms of scaling included.
    item("10 metrics and some 45 of Container Insights", 55 * known("metric_month"))
    item("15 alarms, a dashboard", 15 * known("alarm_month") + known("dashboard_month"))
    item("1 GB of logs, 1 GB of images", known("logs_gb") + known("image_gb_month"))
    secrets = 4 + (set["CertificateArn"] != "") + (set["PineconeIndex"] != "")
    item(secrets " secrets", secrets * known("secret_month"))
    # Each embed receives three times a minute from both queues, each listen counts once a minute.
    item("idle requests to SQS", (set["EmbedMin"] * 6 + set["ListenMin"] * 3) * 60 * hours / 1e6 * known("sqs_million_requests"))
    if (set["PineconeIndex"] != "") item("Pinecone, its least bill", known("pinecone_month_minimum"))
    printf "  %-46s %9.2f\n", "total", total
    busy = (set["EmbedMax"] - set["EmbedMin"]) * task(set["EmbedCpu"], set["EmbedMemory"]) / hours
    printf "While all %d embed run: %.2f more an hour.\n", set["EmbedMax"], busy

    # 78 texts of some 38 tokens a second and virtual CPU: two cores without AVX-512 embed 156 (README, Figures).
    cpu_hours = 1e6 / 78 / 3600
    print "For each million rows of such texts:"
    total = 0
    item("embed, " sprintf("%.1f", cpu_hours) " hours of a virtual CPU", cpu_hours * (vcpu + 2 * gb))
    item("740 requests to SQS", 740 / 1e6 * known("sqs_million_requests"))
    if (set["PineconeIndex"] != "") {
        # 384 numbers of four bytes and 600 bytes of metadata, a unit for each KB; some 4.5 KB as JSON through NAT.
        item("2.1 million write units of Pinecone", 2.1 * known("pinecone_million_write_units"))
        item("4.5 GB through the NAT gateway", 4.5 * known("nat_gb"))
    } else {
        item("2.7 GB of storage, each month", zones * 2.7 * known("rds_gb_month"))
    }
    printf "  %-46s %9.2f\n", "total", total
    print "Prices change: check them before you rely on this. config/aws/prices.toml says when each was read."
    if (memory) print "From memory: " memory "."
}
