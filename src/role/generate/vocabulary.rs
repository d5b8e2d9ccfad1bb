//! The words of the fake products: kinds of products, each with fitting materials, purposes and prices.

/// Source of energy of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Power {
    /// The power grid.
    Mains,
    /// A rechargeable battery.
    Battery,
    /// The sun.
    Solar,
    /// A bottle of gas.
    Gas,
    /// Muscle: a crank, a pump, a pedal.
    Hand,
    /// No energy needed: a chair, a jacket.
    Passive,
}

impl Power {
    /// Whether the product uses electricity.
    #[must_use]
    pub fn is_electric(self) -> bool {
        matches!(self, Self::Mains | Self::Battery | Self::Solar)
    }

    /// Adjectives to put before the noun; an empty one means none.
    pub(super) fn adjectives(self) -> &'static [&'static str] {
        match self {
            Self::Mains => &["electric", "mains-powered electric", "plug-in electric"],
            Self::Battery => &["rechargeable electric", "cordless battery-powered", "battery-electric"],
            Self::Solar => &["solar-powered", "sun-powered solar", "solar-charged"],
            Self::Gas => &["gas-powered", "gas-fired", "gas-fuelled"],
            Self::Hand => &["hand-powered", "manual, hand-operated", "non-electric hand-operated"],
            Self::Passive => &[""],
        }
    }
}

/// A kind of product.
#[derive(Debug)]
pub struct ProductKind {
    /// Code of the kind, and prefix of its SKUs.
    pub code: &'static str,
    /// Nouns for the product inside a sentence.
    pub nouns: &'static [&'static str],
    /// Possible materials.
    pub materials: &'static [&'static str],
    /// Possible sources of energy.
    pub powers: &'static [Power],
    /// Possible purposes.
    pub uses: &'static [&'static str],
    /// Possible functions of artificial intelligence; empty if none is believable.
    pub ai: &'static [&'static str],
    /// People that the product is made for.
    pub audiences: &'static [&'static str],
    /// Sizes as text.
    pub sizes: &'static [&'static str],
    /// Lowest and highest price, in dollars.
    pub price: (u32, u32),
}

/// Sentences about benefits for the environment.
pub(super) const ECO: &[&str] = &[
    "Eco-friendly: built from recycled materials",
    "Eco-friendly and sustainable, with parts that can be repaired",
    "An eco-friendly choice with a small carbon footprint",
    "Environmentally friendly: recycled casing, compostable packaging",
    "Sustainably made by an eco-conscious workshop",
    "Green and eco-friendly, designed to save energy and waste",
];

/// Openings of the sentence about artificial intelligence.
pub(super) const AI_OPENINGS: &[&str] = &[
    "Uses AI to",
    "Built-in artificial intelligence helps to",
    "Machine learning (AI) lets it",
    "An AI assistant helps to",
];

use Power::{Battery, Gas, Hand, Mains, Passive, Solar};

const HOMES: &[&str] = &["families", "students", "small kitchens", "busy households", "first-time buyers"];
const OUTDOORS: &[&str] = &["hikers", "campers", "weekend travellers", "scouts", "mountain guides"];
const TRADES: &[&str] =
    &["professional tradespeople", "home improvers", "carpenters", "weekend builders", "apprentices"];
const GARDENERS: &[&str] = &["gardeners", "homeowners", "landscapers", "allotment growers", "city balconies"];
const OFFICES: &[&str] = &["office workers", "remote workers", "students", "programmers", "small companies"];
const CARE: &[&str] =
    &["elderly people", "seniors living alone", "people with reduced mobility", "carers", "patients at home"];
const PARENTS: &[&str] =
    &["new parents", "families with babies", "grandparents", "nurseries", "childminders"];
const CHILDREN: &[&str] =
    &["toddlers", "young children", "curious kids", "primary schools", "children from three years"];
const PETS: &[&str] = &["dog owners", "cat owners", "puppies", "animal shelters", "lively pets"];
const ATHLETES: &[&str] = &["runners", "athletes", "beginners", "fitness studios", "people training at home"];
const MUSICIANS: &[&str] =
    &["beginners", "music students", "touring musicians", "music schools", "hobby players"];
const MAKERS_OF_PICTURES: &[&str] =
    &["travellers", "hobby photographers", "journalists", "film students", "families"];

/// Every kind. Do not change the order: the same seed would give other products.
pub static PRODUCT_KINDS: &[ProductKind] = &[
    ProductKind {
        code: "KET",
        nouns: &["kettle", "tea kettle", "gooseneck kettle"],
        materials: &["stainless steel", "borosilicate glass", "brushed copper"],
        powers: &[Mains, Mains, Gas],
        uses: &[
            "boiling water for tea",
            "heating water for pour-over coffee",
            "making hot drinks",
            "brewing green tea at the right temperature",
        ],
        ai: &["learn when you want tea and have the water hot", "pick the water temperature for each tea"],
        audiences: HOMES,
        sizes: &["0.8-litre", "1-litre", "1.5-litre", "1.7-litre", "2-litre"],
        price: (24, 160),
    },
    ProductKind {
        code: "ESP",
        nouns: &["espresso machine", "coffee maker", "bean-to-cup coffee machine"],
        materials: &["stainless steel", "matt black steel", "chromed brass"],
        powers: &[Mains, Mains, Hand],
        uses: &[
            "making espresso and cappuccino",
            "brewing strong coffee",
            "pulling espresso shots",
            "frothing milk and making lattes",
        ],
        ai: &["adjust grind and pressure to each bean", "remember how everybody likes their coffee"],
        audiences: &["coffee lovers", "home baristas", "small cafes", "offices"],
        sizes: &["single-boiler", "two-cup", "15-bar", "compact", "dual-boiler"],
        price: (60, 1900),
    },
    ProductKind {
        code: "PAN",
        nouns: &["frying pan", "saucepan set", "set of pots and pans", "casserole pot"],
        materials: &["stainless steel", "cast iron", "enamelled steel", "copper"],
        powers: &[Passive],
        uses: &[
            "searing meat and vegetables",
            "cooking stews and soups",
            "everyday cooking on the stove",
            "frying eggs and fish",
        ],
        ai: &[],
        audiences: HOMES,
        sizes: &["20 cm", "24 cm", "28 cm", "three-piece", "five-piece"],
        price: (19, 320),
    },
    ProductKind {
        code: "BRD",
        nouns: &["chopping board", "serving board", "salad bowl", "set of kitchen utensils"],
        materials: &["bamboo", "olive wood", "oak", "bamboo fibre"],
        powers: &[Passive],
        uses: &[
            "chopping vegetables and herbs",
            "serving bread and cheese",
            "preparing food in the kitchen",
            "tossing salads",
        ],
        ai: &[],
        audiences: HOMES,
        sizes: &["small", "medium", "large", "extra-large", "three-piece"],
        price: (9, 90),
    },
    ProductKind {
        code: "BLD",
        nouns: &["blender", "smoothie maker", "food processor", "hand blender"],
        materials: &["steel and glass", "brushed aluminium", "impact-proof plastic"],
        powers: &[Mains, Battery, Hand],
        uses: &[
            "mixing smoothies and soups",
            "chopping nuts and crushing ice",
            "pureeing baby food and sauces",
            "blending fruit and vegetables",
        ],
        ai: &["recognise ingredients and choose the speed", "suggest recipes from what is in the fridge"],
        audiences: HOMES,
        sizes: &["0.6-litre", "1-litre", "1.5-litre", "2-litre", "three-speed"],
        price: (25, 420),
    },
    ProductKind {
        code: "FRG",
        nouns: &["refrigerator", "fridge-freezer", "wine fridge"],
        materials: &["brushed steel", "white enamel", "black glass"],
        powers: &[Mains],
        uses: &[
            "keeping food fresh at home",
            "storing groceries and frozen food",
            "chilling drinks and wine",
        ],
        ai: &[
            "see what is inside and warn before food spoils",
            "plan meals around what has to be eaten first",
        ],
        audiences: HOMES,
        sizes: &["90-litre", "180-litre", "250-litre", "360-litre", "tall"],
        price: (190, 2600),
    },
    ProductKind {
        code: "COL",
        nouns: &["cool box", "portable fridge", "cooler"],
        materials: &["recycled plastic", "rotomoulded plastic", "aluminium"],
        powers: &[Battery, Solar, Passive],
        uses: &[
            "keeping food and drinks cold on road trips",
            "cooling picnics at the beach",
            "keeping groceries cold while camping",
        ],
        ai: &[],
        audiences: &["campers", "families on the road", "anglers", "van travellers"],
        sizes: &["12-litre", "20-litre", "28-litre", "35-litre", "50-litre"],
        price: (39, 780),
    },
    ProductKind {
        code: "GRL",
        nouns: &["barbecue grill", "grill", "table-top barbecue"],
        materials: &["cast iron", "stainless steel", "enamelled steel"],
        powers: &[Gas, Mains, Passive],
        uses: &[
            "grilling meat and vegetables outdoors",
            "barbecue evenings with friends",
            "grilling fish and skewers on the terrace",
        ],
        ai: &["watch the meat and tell when it is done"],
        audiences: &["families", "garden parties", "balcony owners", "outdoor cooks"],
        sizes: &["two-burner", "three-burner", "portable", "large", "compact"],
        price: (49, 1400),
    },
    ProductKind {
        code: "STV",
        nouns: &["camping stove", "backpacking stove", "camp cooker"],
        materials: &["titanium", "aluminium", "stainless steel"],
        powers: &[Gas, Gas, Hand],
        uses: &["cooking meals at the campsite", "boiling water in the mountains", "cooking on long hikes"],
        ai: &[],
        audiences: OUTDOORS,
        sizes: &["85-gram", "110-gram", "single-burner", "two-burner", "folding"],
        price: (22, 240),
    },
    ProductKind {
        code: "TNT",
        nouns: &["tent", "dome tent", "trekking tent"],
        materials: &["ripstop nylon", "recycled polyester", "cotton canvas"],
        powers: &[Passive],
        uses: &["sleeping outdoors on hiking trips", "camping in wind and rain", "family camping holidays"],
        ai: &[],
        audiences: OUTDOORS,
        sizes: &["one-person", "two-person", "three-person", "four-person", "six-person"],
        price: (69, 900),
    },
    ProductKind {
        code: "SLB",
        nouns: &["sleeping bag", "down quilt", "insulated sleeping mat"],
        materials: &["goose down", "recycled synthetic fill", "merino wool"],
        powers: &[Passive],
        uses: &["sleeping warm in cold nights outdoors", "bivouacs in the mountains", "camping in autumn"],
        ai: &[],
        audiences: OUTDOORS,
        sizes: &["minus 10 degree", "zero degree", "three-season", "ultralight", "extra-wide"],
        price: (45, 620),
    },
    ProductKind {
        code: "WTF",
        nouns: &["water filter bottle", "water purifier", "portable water filter"],
        materials: &["BPA-free plastic", "stainless steel", "ceramic"],
        powers: &[Hand, Passive, Battery],
        uses: &[
            "getting clean drinking water while hiking",
            "purifying water from streams and lakes",
            "safe drinking water on journeys",
        ],
        ai: &[],
        audiences: OUTDOORS,
        sizes: &["0.6-litre", "0.75-litre", "1-litre", "2-litre", "pocket-sized"],
        price: (19, 190),
    },
    ProductKind {
        code: "CHG",
        nouns: &["phone charger", "power bank", "folding charging panel"],
        materials: &["rugged rubber", "aluminium", "recycled plastic"],
        powers: &[Solar, Solar, Battery],
        uses: &[
            "charging phones outdoors",
            "charging phones and cameras off the grid",
            "power on hikes far from a socket",
        ],
        ai: &[],
        audiences: OUTDOORS,
        sizes: &["10-watt", "15-watt", "21-watt", "20,000 mAh", "28-watt"],
        price: (24, 210),
    },
    ProductKind {
        code: "GLT",
        nouns: &["garden light", "path light", "outdoor lantern"],
        materials: &["weatherproof steel", "bamboo", "aluminium"],
        powers: &[Solar, Solar, Mains],
        uses: &[
            "lighting garden paths at night",
            "lighting the terrace and garden",
            "decorating flower beds with light",
        ],
        ai: &["tell people from cats before switching on"],
        audiences: GARDENERS,
        sizes: &["set of four", "set of six", "30 cm", "60 cm", "tall"],
        price: (14, 190),
    },
    ProductKind {
        code: "MOW",
        nouns: &["lawn mower", "robot lawn mower", "push mower"],
        materials: &["steel", "impact-proof plastic", "aluminium"],
        powers: &[Battery, Mains, Hand],
        uses: &["cutting the grass", "mowing small lawns", "keeping the lawn short and even"],
        ai: &["steer around toys and hedgehogs", "plan the mowing by the weather forecast"],
        audiences: GARDENERS,
        sizes: &["32 cm", "38 cm", "42 cm", "400 square metre", "800 square metre"],
        price: (89, 1900),
    },
    ProductKind {
        code: "IRR",
        nouns: &["irrigation kit", "plant watering system", "drip watering set"],
        materials: &["recycled plastic", "brass", "terracotta"],
        powers: &[Solar, Battery, Passive],
        uses: &[
            "watering plants automatically",
            "watering vegetables and tomatoes during holidays",
            "keeping balcony plants watered",
        ],
        ai: &["water by soil moisture and forecast", "learn how much each plant drinks"],
        audiences: GARDENERS,
        sizes: &["ten-plant", "fifteen-plant", "20-metre", "30-plant", "balcony-sized"],
        price: (19, 260),
    },
    ProductKind {
        code: "PRN",
        nouns: &["pair of pruning shears", "hedge trimmer", "pole pruner"],
        materials: &["forged steel", "carbon steel and ash wood", "aluminium"],
        powers: &[Hand, Battery, Mains],
        uses: &["pruning roses and fruit trees", "trimming hedges and shrubs", "cutting branches"],
        ai: &[],
        audiences: GARDENERS,
        sizes: &["20 cm", "45 cm", "55 cm", "telescopic", "lightweight"],
        price: (18, 330),
    },
    ProductKind {
        code: "DRL",
        nouns: &["drill", "hammer drill", "drill driver"],
        materials: &["steel and reinforced plastic", "magnesium alloy", "steel"],
        powers: &[Battery, Mains, Hand],
        uses: &[
            "drilling holes into walls",
            "drilling wood and metal and driving screws",
            "putting up shelves and furniture",
        ],
        ai: &["sense pipes and cables in the wall before drilling"],
        audiences: TRADES,
        sizes: &["12-volt", "18-volt", "700-watt", "850-watt", "two-speed"],
        price: (29, 480),
    },
    ProductKind {
        code: "SAW",
        nouns: &["circular saw", "jigsaw", "bench saw", "fine wood saw"],
        materials: &["tempered steel", "steel and beech wood", "aluminium and steel"],
        powers: &[Mains, Battery, Hand],
        uses: &["sawing boards and beams", "woodworking and joinery", "cutting curves in plywood"],
        ai: &["stop the blade before it touches a finger"],
        audiences: TRADES,
        sizes: &["165 mm", "190 mm", "1,200-watt", "18-volt", "compact"],
        price: (19, 900),
    },
    ProductKind {
        code: "VAC",
        nouns: &["vacuum cleaner", "robot vacuum", "stick vacuum"],
        materials: &["recycled plastic", "impact-proof plastic", "aluminium"],
        powers: &[Mains, Battery],
        uses: &[
            "vacuuming carpets and hard floors",
            "removing pet hair from carpets and sofas",
            "cleaning floors of dust",
        ],
        ai: &["map the rooms and avoid socks and cables", "recognise dirt and clean it twice"],
        audiences: &["pet owners", "families", "small flats", "people with allergies"],
        sizes: &["0.5-litre", "700-watt", "900-watt", "compact", "bagless"],
        price: (59, 1100),
    },
    ProductKind {
        code: "WSH",
        nouns: &["washing machine", "washer-dryer", "tumble dryer"],
        materials: &["white enamel", "stainless steel", "graphite steel"],
        powers: &[Mains],
        uses: &["washing clothes and bed linen", "doing the family's laundry", "drying laundry gently"],
        ai: &["weigh the laundry and choose the program", "detect stains and fabrics"],
        audiences: HOMES,
        sizes: &["6 kg", "7 kg", "8 kg", "9 kg", "slim"],
        price: (280, 1700),
    },
    ProductKind {
        code: "CAM",
        nouns: &["security camera", "doorbell camera", "home surveillance camera"],
        materials: &["weatherproof plastic", "aluminium", "vandal-proof steel"],
        powers: &[Mains, Battery, Solar],
        uses: &[
            "watching the front door and driveway",
            "home security against burglars",
            "keeping an eye on the house while away",
        ],
        ai: &["recognise familiar faces at the door", "tell people from animals and cars"],
        audiences: &["homeowners", "shops", "holiday homes", "tenants"],
        sizes: &["2K", "4K", "wide-angle", "compact", "twin-lens"],
        price: (35, 420),
    },
    ProductKind {
        code: "THM",
        nouns: &["thermostat", "radiator thermostat", "heating controller"],
        materials: &["brushed metal", "white plastic", "glass"],
        powers: &[Battery, Mains],
        uses: &[
            "controlling the heating at home",
            "keeping rooms warm and saving heating costs",
            "setting the temperature room by room",
        ],
        ai: &[
            "learn your habits and heat only when somebody is home",
            "predict how long a room takes to warm up",
        ],
        audiences: &["homeowners", "tenants", "landlords", "families"],
        sizes: &["single-zone", "two-zone", "set of two", "set of three", "wireless"],
        price: (39, 280),
    },
    ProductKind {
        code: "HDP",
        nouns: &["pair of headphones", "pair of noise-cancelling headphones", "headset"],
        materials: &["aluminium and leather", "recycled plastic", "walnut wood"],
        powers: &[Battery],
        uses: &[
            "listening to music in noisy offices",
            "quiet on trains and planes",
            "phone calls in open-plan offices",
        ],
        ai: &["filter voices from noise", "adapt the sound to your hearing"],
        audiences: OFFICES,
        sizes: &["24-hour", "30-hour", "40-hour", "folding", "lightweight"],
        price: (39, 520),
    },
    ProductKind {
        code: "SPK",
        nouns: &["radio", "portable radio", "table radio"],
        materials: &["oak", "recycled plastic", "aluminium"],
        powers: &[Mains, Battery, Hand],
        uses: &[
            "playing music in the living room",
            "listening to news and music",
            "music at parties and in the kitchen",
        ],
        ai: &["answer spoken questions", "choose music to your mood"],
        audiences: &["music lovers", "students", "families", "party hosts"],
        sizes: &["10-watt", "20-watt", "60-watt", "pocket-sized", "stereo"],
        price: (25, 900),
    },
    ProductKind {
        code: "LAP",
        nouns: &["laptop", "notebook computer", "tablet computer"],
        materials: &["aluminium", "magnesium alloy", "recycled aluminium"],
        powers: &[Battery],
        uses: &[
            "programming and office work",
            "studying and writing",
            "video editing and design on the move",
        ],
        ai: &["run language models on the device", "summarise meetings and write drafts"],
        audiences: OFFICES,
        sizes: &["11-inch", "13-inch", "14-inch", "15-inch", "16-inch"],
        price: (290, 2900),
    },
    ProductKind {
        code: "TRL",
        nouns: &["pocket translator", "translation device", "language interpreter"],
        materials: &["aluminium", "recycled plastic", "rubberised plastic"],
        powers: &[Battery],
        uses: &[
            "translating foreign languages in conversation",
            "speaking with locals abroad",
            "reading menus and signs in other languages",
        ],
        ai: &["understand and translate forty languages", "translate speech both ways in real time"],
        audiences: &["travellers", "language learners", "hotels", "business travellers"],
        sizes: &["two-way", "pocket-sized", "touch-screen", "offline", "slim"],
        price: (89, 420),
    },
    ProductKind {
        code: "CHR",
        nouns: &["office chair", "desk chair", "kneeling chair"],
        materials: &["mesh and aluminium", "leather", "beech wood"],
        powers: &[Passive],
        uses: &[
            "sitting comfortably with back pain",
            "healthy posture at the desk",
            "long days at the computer",
        ],
        ai: &[],
        audiences: OFFICES,
        sizes: &["high-back", "adjustable", "extra-wide", "compact", "tall"],
        price: (79, 1300),
    },
    ProductKind {
        code: "DSK",
        nouns: &["standing desk", "height-adjustable desk", "sit-stand desk"],
        materials: &["oak", "bamboo", "walnut", "recycled wood"],
        powers: &[Mains, Hand],
        uses: &[
            "working standing up",
            "changing between sitting and standing at work",
            "a healthy home office",
        ],
        ai: &["remind you to stand up at the right moment"],
        audiences: OFFICES,
        sizes: &["100 cm", "120 cm", "140 cm", "160 cm", "corner"],
        price: (149, 1200),
    },
    ProductKind {
        code: "RLT",
        nouns: &["reading lamp", "bedside lamp", "clip-on book light"],
        materials: &["brass", "bamboo", "aluminium", "linen"],
        powers: &[Mains, Battery],
        uses: &[
            "reading in bed without waking anyone",
            "reading books in the evening",
            "soft light at the bedside",
        ],
        ai: &[],
        audiences: &["readers", "couples", "students", "elderly readers"],
        sizes: &["30 cm", "40 cm", "dimmable", "foldable", "warm-white"],
        price: (12, 180),
    },
    ProductKind {
        code: "SLP",
        nouns: &["sleep tracker", "sleep mask", "bedside sound machine"],
        materials: &["organic cotton", "bamboo fibre", "soft wool"],
        powers: &[Battery],
        uses: &["sleeping better at night", "falling asleep faster", "deep and quiet sleep"],
        ai: &["analyse your sleep and wake you gently", "find out what disturbs your sleep"],
        audiences: &["light sleepers", "shift workers", "people who sleep badly", "parents"],
        sizes: &["small", "lightweight", "two-person", "quiet", "travel-sized"],
        price: (25, 260),
    },
    ProductKind {
        code: "BPM",
        nouns: &["blood pressure monitor", "pulse oximeter", "heart monitor"],
        materials: &["medical-grade plastic", "soft fabric", "aluminium"],
        powers: &[Battery, Mains],
        uses: &[
            "measuring blood pressure at home",
            "watching heart rate and oxygen",
            "sharing health readings with a doctor",
        ],
        ai: &["detect irregular heartbeats", "warn early of health risks"],
        audiences: CARE,
        sizes: &["upper-arm", "wrist", "large-display", "compact", "two-user"],
        price: (25, 260),
    },
    ProductKind {
        code: "MOB",
        nouns: &["mobility scooter", "stair lift", "motorised walking frame"],
        materials: &["aluminium", "steel", "carbon fibre"],
        powers: &[Battery, Mains],
        uses: &[
            "walking safely with weak legs",
            "getting around independently in old age",
            "living at home safely in old age",
        ],
        ai: &["detect falls and call for help"],
        audiences: CARE,
        sizes: &["foldable", "lightweight", "120 kg", "150 kg", "indoor"],
        price: (29, 2900),
    },
    ProductKind {
        code: "BAB",
        nouns: &["baby monitor", "baby cam", "breathing monitor for babies"],
        materials: &["recycled plastic", "soft silicone", "white plastic"],
        powers: &[Battery, Mains],
        uses: &[
            "hearing and seeing the baby from another room",
            "watching over a sleeping baby",
            "listening to the nursery",
        ],
        ai: &["tell hungry crying from tired crying", "notice when the baby stops breathing evenly"],
        audiences: PARENTS,
        sizes: &["300-metre", "five-inch", "two-way", "wide-angle", "compact"],
        price: (39, 330),
    },
    ProductKind {
        code: "STR",
        nouns: &["pushchair", "stroller", "baby carrier", "child car seat"],
        materials: &["aluminium and cotton", "organic cotton", "recycled polyester"],
        powers: &[Passive],
        uses: &["carrying a baby through town", "taking babies for walks", "safe trips with a small child"],
        ai: &[],
        audiences: PARENTS,
        sizes: &["foldable", "twin", "lightweight", "cabin-sized", "all-terrain"],
        price: (49, 1100),
    },
    ProductKind {
        code: "TOY",
        nouns: &["building block set", "toy train", "talking puzzle", "toy robot"],
        materials: &["beech wood", "recycled plastic", "bamboo", "maple wood"],
        powers: &[Passive, Battery],
        uses: &["learning through play", "building towers and bridges", "playing with friends and siblings"],
        ai: &["answer children's questions", "teach first steps in programming"],
        audiences: CHILDREN,
        sizes: &["24-piece", "48-piece", "100-piece", "giant", "starter"],
        price: (12, 180),
    },
    ProductKind {
        code: "PET",
        nouns: &["dog toy", "cat toy", "pet feeder", "treat dispenser"],
        materials: &["natural rubber", "stainless steel", "bamboo", "hemp rope"],
        powers: &[Passive, Battery],
        uses: &["keeping dogs busy", "feeding pets on time", "entertaining cats and dogs at home"],
        ai: &["recognise each pet and portion its food"],
        audiences: PETS,
        sizes: &["small", "medium", "large", "2-litre", "indestructible"],
        price: (9, 190),
    },
    ProductKind {
        code: "BIK",
        nouns: &["bicycle", "city bike", "folding bike", "commuter bike"],
        materials: &["aluminium", "steel", "carbon fibre", "bamboo"],
        powers: &[Battery, Passive],
        uses: &["commuting to work by bike", "cycling through the city", "riding to school and to the shops"],
        ai: &["adapt the motor to rider and hill"],
        audiences: &["commuters", "students", "families", "city dwellers"],
        sizes: &["20-inch", "26-inch", "28-inch", "seven-gear", "eleven-gear"],
        price: (190, 3400),
    },
    ProductKind {
        code: "FIT",
        nouns: &["rowing machine", "exercise bike", "treadmill", "cross trainer"],
        materials: &["steel", "ash wood", "cast iron"],
        powers: &[Mains, Passive],
        uses: &["working out at home", "building strength and endurance", "fitness training in winter"],
        ai: &["act as a personal trainer and correct your form", "build a training plan from your progress"],
        audiences: ATHLETES,
        sizes: &["foldable", "120 kg", "150 kg", "16-level", "compact"],
        price: (39, 2400),
    },
    ProductKind {
        code: "JKT",
        nouns: &["winter jacket", "ski jacket", "insulated parka"],
        materials: &["recycled polyester", "merino wool", "goose down"],
        powers: &[Passive, Battery],
        uses: &["keeping warm while skiing", "cold and snowy days", "winter walks in wind and snow"],
        ai: &[],
        audiences: &["skiers", "women", "men", "winter commuters"],
        sizes: &["small", "medium", "large", "extra-large", "tall"],
        price: (69, 720),
    },
    ProductKind {
        code: "BOT",
        nouns: &["pair of hiking boots", "pair of running shoes", "pair of trail shoes"],
        materials: &["leather", "recycled mesh", "waterproof membrane"],
        powers: &[Passive],
        uses: &[
            "walking on rough mountain paths",
            "running on roads and trails",
            "long hikes in wet weather",
        ],
        ai: &[],
        audiences: ATHLETES,
        sizes: &["size 38", "size 40", "size 42", "size 44", "wide-fit"],
        price: (59, 320),
    },
    ProductKind {
        code: "GTR",
        nouns: &["digital piano", "keyboard", "practice drum kit"],
        materials: &["black lacquer", "maple wood", "recycled wood"],
        powers: &[Mains, Battery],
        uses: &[
            "learning to play music",
            "playing songs at home and on stage",
            "practising scales and rhythms",
        ],
        ai: &["listen and correct wrong notes"],
        audiences: MUSICIANS,
        sizes: &["compact", "full-size", "stage-ready", "quiet", "travel-sized"],
        price: (49, 1900),
    },
    ProductKind {
        code: "PHO",
        nouns: &["camera", "mirrorless camera", "travel camera", "action camera"],
        materials: &["magnesium alloy", "aluminium", "weather-sealed plastic"],
        powers: &[Battery],
        uses: &[
            "taking photographs on journeys",
            "filming and photographing wildlife",
            "portrait and street photography",
        ],
        ai: &["find eyes and keep them in focus", "remove noise from night shots"],
        audiences: MAKERS_OF_PICTURES,
        sizes: &["20-megapixel", "24-megapixel", "33-megapixel", "4K", "pocket-sized"],
        price: (149, 3600),
    },
    ProductKind {
        code: "AIR",
        nouns: &["air purifier", "air cleaner", "room air filter"],
        materials: &["white plastic", "bamboo", "aluminium"],
        powers: &[Mains, Battery],
        uses: &[
            "cleaning the air of pollen and dust",
            "fresh air in the bedroom",
            "taking smoke and smells out of rooms",
        ],
        ai: &["measure the air and clean before you notice"],
        audiences: &["people with allergies", "families", "offices", "city dwellers"],
        sizes: &["20 square metre", "40 square metre", "60 square metre", "quiet", "tower"],
        price: (29, 620),
    },
];
